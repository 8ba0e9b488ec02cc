// SPDX-License-Identifier: Apache-2.0

package boot

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// sigchldInfo is siginfo_t as waitid(2) fills it: unix.Siginfo keeps the pid in an unnamed blob. On 64-bit machines the
// union is aligned to 8 bytes.
type sigchldInfo struct {
	signo, errno, code int32
	_                  int32
	pid                int32
	uid                uint32
	status             int32
	_                  [100]byte
}

// siginfo_t has 128 bytes on every Linux machine.
var _ [128]byte = [unsafe.Sizeof(sigchldInfo{})]byte{}

func waitid(kind, id int, info *sigchldInfo, options int) error {
	return unix.Waitid(kind, id, (*unix.Siginfo)(unsafe.Pointer(info)), options, nil)
}
