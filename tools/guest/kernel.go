// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"encoding/binary"
	"errors"
)

// kernelRelease reads the release ("6.12.95-cloud-amd64") out of a bzImage: the setup header's kernel_version field, see
// Documentation/arch/x86/boot.rst of Linux.
func kernelRelease(image []byte) (string, error) {
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
	text = text[:min(len(text), longest)]
	release, _, found := bytes.Cut(text, []byte{' '})
	if !found || len(release) == 0 || bytes.IndexByte(release, 0) >= 0 {
		return "", errors.New("the bzImage's kernel version is not a text")
	}
	return string(release), nil
}
