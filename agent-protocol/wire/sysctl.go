// SPDX-License-Identifier: Apache-2.0

package wire

import "strings"

// SysctlScope is what a kernel parameter belongs to.
type SysctlScope int

const (
	// SysctlRefused is a parameter of the guest's kernel as a whole, or one that is not known.
	SysctlRefused SysctlScope = iota
	// SysctlNetwork, SysctlIPC and SysctlUTS are parameters of one namespace. The network is always the pod's.
	SysctlNetwork
	SysctlIPC
	SysctlUTS
)

// ScopeOfSysctl tells a kernel parameter's scope by its name in sysctl's notation with dots. Host and guest go by this one list.
func ScopeOfSysctl(key string) SysctlScope {
	switch {
	case strings.HasPrefix(key, "net."):
		return SysctlNetwork
	case key == "kernel.sem", strings.HasPrefix(key, "fs.mqueue."),
		strings.Count(key, ".") == 1 && (strings.HasPrefix(key, "kernel.shm") || strings.HasPrefix(key, "kernel.msg")):
		return SysctlIPC
	case key == "kernel.domainname":
		return SysctlUTS
	}
	return SysctlRefused
}
