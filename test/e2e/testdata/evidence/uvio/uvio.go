// SPDX-License-Identifier: Apache-2.0

// Package uvio lays out the memory of a guest's call to the ultravisor for evidence: ioctl UVIO_IOCTL_ATT of /dev/uv
// (Linux, arch/s390/include/uapi/asm/uvdevice.h, struct uvio_ioctl_cb and struct uvio_attest).
package uvio

import (
	"encoding/binary"
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	// Attest is the ioctl's number: _IOWR('u', 1, struct uvio_ioctl_cb).
	Attest = 0xc0407501
	// ControlSize and ArgumentSize are the sizes of the two structures, bytes.
	ControlSize  = 0x40
	ArgumentSize = 0x138
	// Executed is the return code of a call that the ultravisor answered.
	Executed = 0x0001

	// struct uvio_ioctl_cb; what is not named is zero.
	offRC, offRRC      = 0x04, 0x06
	offArgument        = 0x08
	offArgumentLen     = 0x10
	offRequest         = 0x00 // struct uvio_attest
	offMeasurement     = 0x08
	offAdditional      = 0x10
	offUser            = 0x18
	offCUID            = 0x118
	offRequestLen      = 0x128
	offMeasurementLen  = 0x12c
	offAdditionalLen   = 0x130
	offUserLen         = 0x134
	maxUser            = 0x100
	cuidSize           = 0x10
	maxRequest         = 1 << 20
	maxMeasurementSize = 32 << 10
	maxAdditionalSize  = 32 << 10
)

// Call is the memory of one call. It is mapped, so that the addresses in it stay what they are.
type Call struct {
	order  binary.ByteOrder
	memory []byte
	base   uint64

	request, user, measurement, additional int // sizes
}

// NewCall prepares a call with a request (an ARCB) and data of the guest's own; measurement and additional are the sizes
// of what is expected, in bytes. order is binary.NativeEndian except in tests. The caller closes it.
func NewCall(order binary.ByteOrder, request, user []byte, measurement, additional int) (*Call, error) {
	switch {
	case len(request) == 0 || len(request) > maxRequest:
		return nil, fmt.Errorf("a request of %d bytes, want 1 to %d", len(request), maxRequest)
	case len(user) > maxUser:
		return nil, fmt.Errorf("%d bytes of user data, at most %d go in", len(user), maxUser)
	case measurement < 1 || measurement > maxMeasurementSize || additional < 0 || additional > maxAdditionalSize:
		return nil, fmt.Errorf("room for %d bytes of measurement and %d of additional data", measurement, additional)
	}
	c := &Call{order: order, request: len(request), user: len(user), measurement: measurement, additional: additional}
	var err error
	c.memory, err = unix.Mmap(-1, 0, ControlSize+ArgumentSize+len(request)+measurement+additional, unix.PROT_READ|unix.PROT_WRITE,
		unix.MAP_PRIVATE|unix.MAP_ANON)
	if err != nil {
		return nil, fmt.Errorf("memory for the call: %w", err)
	}
	c.base = uint64(uintptr(unsafe.Pointer(&c.memory[0])))
	order.PutUint64(c.memory[offArgument:], c.base+ControlSize)
	order.PutUint32(c.memory[offArgumentLen:], ArgumentSize)

	at := ControlSize + ArgumentSize
	copy(c.memory[at:], request)
	arg := c.argument()
	order.PutUint64(arg[offRequest:], c.base+uint64(at))
	order.PutUint64(arg[offMeasurement:], c.base+uint64(at+len(request)))
	if additional > 0 {
		order.PutUint64(arg[offAdditional:], c.base+uint64(at+len(request)+measurement))
	}
	copy(arg[offUser:], user)
	order.PutUint32(arg[offRequestLen:], uint32(len(request)))
	order.PutUint32(arg[offMeasurementLen:], uint32(measurement))
	order.PutUint32(arg[offAdditionalLen:], uint32(additional))
	order.PutUint16(arg[offUserLen:], uint16(len(user)))
	return c, nil
}

func (c *Call) argument() []byte { return c.memory[ControlSize : ControlSize+ArgumentSize] }

// Control is what the ioctl gets the address of.
func (c *Call) Control() []byte { return c.memory[:ControlSize:ControlSize] }

// At is the call's memory at an address, nil if it is not all in it.
func (c *Call) At(address uint64, size int) []byte {
	end := uint64(len(c.memory))
	if address < c.base || address-c.base > end || uint64(size) > end-(address-c.base) {
		return nil
	}
	return c.memory[address-c.base:][:size:size]
}

// Answer is what the ultravisor wrote, copied.
func (c *Call) Answer() (measurement, additional []byte, cuid [cuidSize]byte, err error) {
	rc, rrc := c.order.Uint16(c.memory[offRC:]), c.order.Uint16(c.memory[offRRC:])
	if rc != Executed {
		return nil, nil, cuid, fmt.Errorf("the ultravisor refused the request: RC 0x%04x, RRC 0x%04x", rc, rrc)
	}
	at := ControlSize + ArgumentSize + c.request
	measurement = append(measurement, c.memory[at:at+c.measurement]...)
	additional = append(additional, c.memory[at+c.measurement:]...)
	return measurement, additional, [cuidSize]byte(c.argument()[offCUID:]), nil
}

// Close gives the memory back.
func (c *Call) Close() error { return unix.Munmap(c.memory) }
