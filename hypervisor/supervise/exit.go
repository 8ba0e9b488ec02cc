// SPDX-License-Identifier: Apache-2.0

package supervise

import (
	"fmt"
	"strings"
	"syscall"
)

const (
	// PanicMark begins the Linux kernel's line about a panic.
	PanicMark = "Kernel panic - not syncing"
	maxLine   = 256
)

// PanicLine finds the kernel's last words on the console; empty if there was no panic.
func PanicLine(console string) string {
	i := strings.LastIndex(console, "end "+PanicMark) // "---[ end Kernel panic - not syncing: … ]---" repeats the first one
	if i < 0 {
		i = len(console)
	}
	if j := strings.LastIndex(console[:i], PanicMark); j >= 0 {
		line, _, _ := strings.Cut(console[j:], "\n")
		return Clip(line)
	}
	return ""
}

// Clip makes a guest's or a VMM's words fit for an error message: one line, bounded, without control characters.
func Clip(s string) string {
	s = strings.Join(strings.Fields(Clean(s)), " ")
	if len(s) > maxLine {
		s = strings.ToValidUTF8(s[:maxLine], "")
	}
	return s
}

// Signaled says for people that a signal ended a VMM, and what to look for.
func Signaled(name string, s syscall.Signal) string {
	text := fmt.Sprintf("%s was killed by signal %d (%v)", name, s, s)
	switch s {
	case syscall.SIGKILL:
		text += ": by somebody on the host, or by the kernel for want of memory (see its log)"
	case syscall.SIGSYS:
		text += ": its seccomp sandbox forbids what it did; hypervisor.sandbox = false shows whether that is so"
	}
	return text
}
