// SPDX-License-Identifier: Apache-2.0

package report

import (
	"fmt"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// tdxGuest is the device of Linux' tdx-guest driver.
const tdxGuest = "/dev/tdx_guest"

// tdxRequest is struct tdx_report_req, and getReport0 TDX_CMD_GET_REPORT0, _IOWR('T', 1, struct tdx_report_req): Linux,
// include/uapi/linux/tdx-guest.h. TDX is on x86-64 alone, where the number below is right.
type tdxRequest struct {
	reportData [NonceSize]byte
	report     [tdxSize]byte
}

const getReport0 = 3<<30 | uint(unsafe.Sizeof(tdxRequest{}))<<16 | 'T'<<8 | 1

func (h Hardware) tdreport(nonce [NonceSize]byte) ([]byte, error) {
	fd, err := unix.Open(h.Root+tdxGuest, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", tdxGuest, err)
	}
	defer unix.Close(fd)
	req := &tdxRequest{reportData: nonce}
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), uintptr(getReport0), uintptr(unsafe.Pointer(req)))
	runtime.KeepAlive(req)
	if errno != 0 {
		return nil, fmt.Errorf("TDX_CMD_GET_REPORT0: %w", errno)
	}
	return req.report[:], nil
}
