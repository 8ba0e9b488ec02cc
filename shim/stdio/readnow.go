// SPDX-License-Identifier: Apache-2.0

package stdio

import (
	"errors"
	"syscall"

	"golang.org/x/sys/unix"
)

// readNow reads once and does not wait: no bytes and no error mean that there are none at this time.
func readNow(raw syscall.RawConn, buf []byte) (n int, err error) {
	rerr := raw.Read(func(fd uintptr) bool {
		for {
			n, err = unix.Read(int(fd), buf)
			if !errors.Is(err, unix.EINTR) {
				return true
			}
		}
	})
	if rerr != nil {
		return 0, rerr
	}
	if errors.Is(err, unix.EAGAIN) {
		return 0, nil
	}
	return max(n, 0), err
}
