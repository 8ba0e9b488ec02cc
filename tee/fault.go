// SPDX-License-Identifier: Apache-2.0

package tee

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"
)

// Fault is a setting that a platform cannot be launched with, or that would weaken it.
type Fault struct {
	// Key of the configuration, "tee.snp.policy" for example.
	Key string
	// Reason says what was found and why that is not possible, Fix what to do.
	Reason, Fix string
}

func (f Fault) String() string { return f.Key + ": " + f.Reason + "; " + f.Fix }

// Faults are all that is wrong with a platform's settings. It is an errdefs.ErrInvalidArgument.
type Faults []Fault

// Add adds a fault; the format of the reason is fmt.Sprintf's.
func (fs *Faults) Add(key, fix, format string, a ...any) {
	*fs = append(*fs, Fault{Key: key, Reason: fmt.Sprintf(format, a...), Fix: fix})
}

// CheckPaths adds a fault for each path that is not absolute, of files and of the directories of firmware descriptors.
func (fs *Faults) CheckPaths(files []File, descriptors []string) {
	for _, f := range files {
		if f.Path != "" && !filepath.IsAbs(f.Path) {
			fs.Add(f.Key, "give one that starts with \"/\"", "%q is not an absolute path", f.Path)
		}
	}
	for _, d := range descriptors {
		if !filepath.IsAbs(d) {
			fs.Add("tee.firmware_descriptors", "give one that starts with \"/\"", "%q is not an absolute path", d)
		}
	}
}

// Digests returns SHA-256 digests in lower-case digits, and adds a fault for each that is none.
func (fs *Faults) Digests(key string, digests []string) (lower []string) {
	for _, d := range digests {
		if raw, err := hex.DecodeString(d); err != nil || len(raw) != sha256.Size {
			fs.Add(key, "give 64 hexadecimal digits", "%q is not a SHA-256 digest", d)
		}
		lower = append(lower, strings.ToLower(d))
	}
	return lower
}

// Error names every fault.
func (fs Faults) Error() string {
	lines := make([]string, 0, len(fs))
	for _, f := range fs {
		lines = append(lines, f.String())
	}
	return strings.Join(lines, "\n")
}

// Unwrap returns the error's kind.
func (fs Faults) Unwrap() error { return errdefs.ErrInvalidArgument }

// Err returns the faults as an error; nil if there is none.
func (fs Faults) Err() error {
	if len(fs) == 0 {
		return nil
	}
	return fs
}

// Advice is what to do about words of a VMM or a guest that mean little to whoever runs a node.
type Advice struct{ Said, Do string }

// Advise returns the advice about the first words that are found in the text; empty if there are none.
func Advise(text string, all ...Advice) string {
	for _, a := range all {
		if strings.Contains(text, a.Said) {
			return a.Do
		}
	}
	return ""
}

// NoPrivateMemory is QEMU's word (system/physmem.c: "cannot set up private guest memory for …: KVM required") where a
// confidential VM is to be emulated.
var NoPrivateMemory = Advice{"private guest memory for", "confidential VMs need KVM (hypervisor.accel)"}
