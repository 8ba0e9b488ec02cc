// SPDX-License-Identifier: Apache-2.0

package igvmtest

import (
	"encoding/binary"
	"hash/crc32"
)

const pageSize = 4096

// Mask is the compatibility mask of what New and the methods add.
const Mask = 1

// Builder of a file. The zero value is a file without headers.
type Builder struct {
	headers, data []byte
	// pages to be placed: offsets in headers where the file offset of a page of data goes, by page.
	places []int
}

// New returns a builder that has the platform SEV-SNP and a policy.
func New(policy uint64) *Builder {
	b := new(Builder)
	b.Header(0x1, le(uint32(Mask), uint8(0), uint8(2), uint16(1), uint64(0)))
	b.Header(0x101, le(policy, uint32(Mask), uint32(0)))
	return b
}

// Header adds any header.
func (b *Builder) Header(kind uint32, content []byte) {
	b.headers = append(b.headers, le(kind, uint32(len(content)))...)
	b.headers = append(b.headers, content...)
	for len(b.headers)%8 != 0 {
		b.headers = append(b.headers, 0)
	}
}

// content adds a page of data, whose place in the file goes into the next header at offset at; nil adds none.
func (b *Builder) content(at int, page []byte) {
	if page == nil {
		return
	}
	b.places = append(b.places, len(b.headers)+8+at)
	b.data = append(b.data, page...)
	b.data = append(b.data, make([]byte, (pageSize-len(b.data)%pageSize)%pageSize)...)
}

// Page adds a page of a data type (0 normal, 1 secrets, 2 CPUID), with content or zeros.
func (b *Builder) Page(gpa uint64, kind uint16, flags uint32, content []byte) {
	b.content(12, content)
	b.Header(0x302, le(gpa, uint32(Mask), uint32(0), flags, kind, uint16(0)))
}

// Parameters adds an area of parameters with the number, in memory at gpa.
func (b *Builder) Parameters(gpa uint64, number uint32) {
	b.Header(0x301, le(uint64(pageSize), number, uint32(0)))
	b.Header(0x30c, le(number, uint32(0)))
	b.Header(0x303, le(gpa, uint32(Mask), number))
}

// VP adds the first state of a virtual processor.
func (b *Builder) VP(number uint16, vmsa []byte) {
	b.content(12, vmsa)
	b.Header(0x304, le(uint64(0xfffffffff000), uint32(Mask), uint32(0), number, uint16(0)))
}

// Bytes is the file.
func (b *Builder) Bytes() []byte {
	const fixed = 24
	first := uint32(fixed + len(b.headers))
	headers := append([]byte(nil), b.headers...)
	for i, place := range b.places {
		binary.LittleEndian.PutUint32(headers[place:], first+uint32(i*pageSize))
	}
	file := append([]byte("IGVM"), le(uint32(1), uint32(fixed), uint32(len(headers)), first+uint32(len(b.data)), uint32(0))...)
	file = append(file, headers...)
	binary.LittleEndian.PutUint32(file[20:], crc32.ChecksumIEEE(file))
	return append(file, b.data...)
}

// le is the numbers in little-endian order.
func le(numbers ...any) (b []byte) {
	for _, n := range numbers {
		b, _ = binary.Append(b, binary.LittleEndian, n) // numbers of fixed size never fail
	}
	return b
}
