// SPDX-License-Identifier: Apache-2.0

package attest

import (
	"encoding/binary"
	"fmt"

	"github.com/containerd/errdefs"
)

// Limits of the parts of an exchange, in bytes: those of the device /dev/uv (Linux, arch/s390/include/uapi/asm/uvdevice.h).
const (
	MaxRequest     = 1 << 20
	MaxMeasurement = 32 << 10
	MaxAdditional  = 32 << 10
	MaxUser        = 256

	exchangeMagic   = "pvattest"
	exchangeVersion = 0x100
	exchangeHeader  = 0x40
	// MaxExchange bounds a file.
	MaxExchange = exchangeHeader + MaxRequest + MaxMeasurement + MaxAdditional + MaxUser + CUIDSize
)

// Exchange is the file that goes to the guest with a request and comes back with an answer: the format of s390-tools'
// pvattest, so that its tools can take either part.
type Exchange struct {
	Request []byte
	// MeasurementSize and AdditionalSize are how much room an answer needs, of a request.
	MeasurementSize, AdditionalSize uint32
	// Measurement, Additional, User and CUID are the answer; a request has none of them.
	Measurement, Additional, User []byte
	CUID                          *[CUIDSize]byte
}

// NewExchange is the file for a request with flags.
func NewExchange(request []byte, flags Flags) *Exchange {
	return &Exchange{Request: request, MeasurementSize: MeasurementSize, AdditionalSize: uint32(flags.AdditionalSize())}
}

// part is an entry of the header: data, or the size that is expected.
type part struct {
	name     string
	data     []byte
	expected uint32
	max      int
}

func (e *Exchange) parts() []part {
	var cuid []byte
	if e.CUID != nil {
		cuid = e.CUID[:]
	}
	return []part{
		{"request", e.Request, 0, MaxRequest},
		{"measurement", e.Measurement, e.MeasurementSize, MaxMeasurement},
		{"additional data", e.Additional, e.AdditionalSize, MaxAdditional},
		{"user data", e.User, 0, MaxUser},
		{"configuration id", cuid, 0, CUIDSize},
	}
}

func exchangeFault(format string, a ...any) error {
	return fmt.Errorf("attestation exchange: %s: %w", fmt.Sprintf(format, a...), errdefs.ErrInvalidArgument)
}

// Marshal returns the file.
func (e *Exchange) Marshal() ([]byte, error) {
	header := []byte(exchangeMagic)
	header = binary.BigEndian.AppendUint32(header, exchangeVersion)
	var body []byte
	var entries []byte
	for _, p := range e.parts() {
		size, offset := p.expected, uint32(0)
		if len(p.data) > 0 {
			size, offset = uint32(len(p.data)), uint32(exchangeHeader+len(body))
		}
		if len(p.data) > p.max || int64(size) > int64(p.max) {
			return nil, exchangeFault("the %s has more than %d bytes", p.name, p.max)
		}
		body = append(body, p.data...)
		entries = binary.BigEndian.AppendUint32(entries, size)
		entries = binary.BigEndian.AppendUint32(entries, offset)
	}
	if len(e.Request) == 0 {
		return nil, exchangeFault("there is no request")
	}
	header = binary.BigEndian.AppendUint32(header, uint32(exchangeHeader+len(body)))
	header = append(header, make([]byte, 8)...)
	return append(append(header, entries...), body...), nil
}

// ParseExchange reads a file. Its parts stand one after the other in the order of the header; anything else is refused.
func ParseExchange(b []byte) (*Exchange, error) {
	switch {
	case len(b) < exchangeHeader || string(b[:len(exchangeMagic)]) != exchangeMagic:
		return nil, exchangeFault("it does not start with %q", exchangeMagic)
	case len(b) > MaxExchange:
		return nil, exchangeFault("it has more than %d bytes", MaxExchange)
	case binary.BigEndian.Uint32(b[8:]) != exchangeVersion:
		return nil, exchangeFault("version 0x%x, want 0x%x", binary.BigEndian.Uint32(b[8:]), exchangeVersion)
	case binary.BigEndian.Uint32(b[12:]) != uint32(len(b)):
		return nil, exchangeFault("it has %d bytes, by its own word %d", len(b), binary.BigEndian.Uint32(b[12:]))
	case binary.BigEndian.Uint64(b[16:]) != 0:
		return nil, exchangeFault("reserved bytes are set")
	}
	e := &Exchange{}
	var cuid []byte
	next := uint32(exchangeHeader)
	for i, to := range []struct {
		data     *[]byte
		expected *uint32
	}{{&e.Request, nil}, {&e.Measurement, &e.MeasurementSize}, {&e.Additional, &e.AdditionalSize}, {&e.User, nil}, {&cuid, nil}} {
		p := e.parts()[i]
		size, offset := binary.BigEndian.Uint32(b[24+8*i:]), binary.BigEndian.Uint32(b[28+8*i:])
		switch {
		case size == 0 && offset == 0:
			continue
		case size > uint32(p.max):
			return nil, exchangeFault("the %s has %d bytes, at most %d are accepted", p.name, size, p.max)
		case offset == 0 && to.expected == nil:
			return nil, exchangeFault("the %s is missing", p.name)
		case offset == 0:
			*to.expected = size
			continue
		case size == 0 || offset != next || size > uint32(len(b))-next:
			return nil, exchangeFault("the %s at 0x%x with %d bytes is not where it should be, 0x%x", p.name, offset, size, next)
		}
		*to.data = b[offset : offset+size : offset+size]
		next += size
		if to.expected != nil {
			*to.expected = size
		}
	}
	switch {
	case next != uint32(len(b)):
		return nil, exchangeFault("%d bytes belong to nothing", uint32(len(b))-next)
	case e.Request == nil:
		return nil, exchangeFault("there is no request")
	case cuid != nil && len(cuid) != CUIDSize:
		return nil, exchangeFault("the configuration id has %d bytes, want %d", len(cuid), CUIDSize)
	case cuid != nil:
		e.CUID = (*[CUIDSize]byte)(cuid)
	}
	return e, nil
}
