// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/cloister-project/cloister/tee/se/attest"
	"github.com/cloister-project/cloister/test/e2e/testdata/evidence/uvio"
)

// uvDirectory is the device /dev/uv in sysfs.
const uvDirectory = "/sys/class/misc/uv"

// uvAnswer asks the ultravisor to answer a request, and returns the exchange with the answer.
func uvAnswer(raw, user []byte) (_ []byte, err error) {
	e, err := attest.ParseExchange(raw)
	if err != nil {
		return nil, err
	}
	device, _, err := openDevice(uvDirectory)
	if errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("no /dev/uv: no ultravisor protects this guest, or its kernel has not loaded uvdevice (%w)", err)
	}
	if err != nil {
		return nil, fmt.Errorf("/dev/uv: %w", err)
	}
	defer device.Close()
	call, err := uvio.NewCall(binary.NativeEndian, e.Request, user, int(e.MeasurementSize), int(e.AdditionalSize))
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, call.Close()) }()
	control := call.Control()
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, device.Fd(), uvio.Attest, uintptr(unsafe.Pointer(&control[0]))); errno != 0 {
		return nil, fmt.Errorf("UVIO_IOCTL_ATT: %w", errno)
	}
	measurement, additional, cuid, err := call.Answer()
	if err != nil {
		return nil, err
	}
	e.Measurement, e.Additional, e.User, e.CUID = measurement, additional, user, &cuid
	return e.Marshal()
}
