// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"encoding/binary"
	"errors"
)

// bzImageRelease reads the release ("6.12.95-cloud-amd64") out of a bzImage: the setup header's kernel_version field, see
// Documentation/arch/x86/boot.rst of Linux.
func bzImageRelease(image []byte) (string, error) {
	const (
		magicAt   = 0x202
		versionAt = 0x20e
		base      = 0x200
		longest   = 256
	)
	if len(image) < 0x210 || !bytes.Equal(image[magicAt:magicAt+4], []byte("HdrS")) {
		return "", errors.New("not a bzImage (no HdrS at 0x202)")
	}
	at := int(binary.LittleEndian.Uint16(image[versionAt:]))
	if at == 0 || base+at >= len(image) {
		return "", errors.New("the bzImage's setup header names no kernel version")
	}
	text := image[base+at:]
	return firstWord(text[:min(len(text), longest)])
}

// s390xRelease reads the release out of a raw kernel image for s390x. The image's head is loaded at address 0, so offsets
// in the file are addresses; at 0x10400 is struct parmarea of Linux's arch/s390/include/asm/setup.h, big-endian, with
// kernel_version, the address of a text.
func s390xRelease(image []byte) (string, error) {
	const (
		magicAt   = 0x10008
		versionAt = 0x10428
		longest   = 256
	)
	if len(image) < versionAt+8 || !bytes.Equal(image[magicAt:magicAt+6], []byte("S390EP")) {
		return "", errors.New("not a kernel image for s390x (no S390EP at 0x10008)")
	}
	at := binary.BigEndian.Uint64(image[versionAt:])
	if at == 0 || at >= uint64(len(image)) {
		return "", errors.New("the image's parameter area names no kernel version")
	}
	return firstWord(image[at:min(at+longest, uint64(len(image)))])
}

// firstWord is the release in a kernel's version text, "6.12.95 (builder) #1 …".
func firstWord(text []byte) (string, error) {
	release, _, found := bytes.Cut(text, []byte{' '})
	if !found || len(release) == 0 || bytes.IndexByte(release, 0) >= 0 {
		return "", errors.New("the kernel's version is not a text")
	}
	return string(release), nil
}
