// SPDX-License-Identifier: Apache-2.0

package hostcheck

import (
	"fmt"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Landlock returns errdefs.ErrNotImplemented if the host's kernel has no landlock (landlock(7)).
func Landlock() error {
	// A ruleset is not made: with this flag the call returns the version of the interface.
	if _, _, errno := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, 0, 0, unix.LANDLOCK_CREATE_RULESET_VERSION); errno != 0 {
		return fmt.Errorf("this kernel has no landlock (%w), which keeps the VMM from files that are not its own; add landlock to the kernel's "+
			"parameter lsm= (or set hypervisor.sandbox = false): %w", errno, errdefs.ErrNotImplemented)
	}
	return nil
}
