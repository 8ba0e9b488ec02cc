// SPDX-License-Identifier: Apache-2.0

package vsock

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

func ioctlSetCID(fd uintptr, cid uint64) error {
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, fd, vhostVsockSetGuestCID, uintptr(unsafe.Pointer(&cid))); errno != 0 {
		return errno
	}
	return nil
}
