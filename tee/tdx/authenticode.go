// SPDX-License-Identifier: Apache-2.0

package tdx

import (
	"cmp"
	"crypto/sha512"
	"encoding/binary"
	"fmt"
	"slices"

	"github.com/containerd/errdefs"
)

// PE/COFF, Microsoft's PE Format: the fields that the hash needs.
const (
	dosHeaderSize    = 64
	dosPEOffset      = 0x3c
	coffSize         = 4 + 20 // the signature in front included
	machineAMD64     = 0x8664
	magicPE32Plus    = 0x20b
	optChecksum      = 64
	optHeadersSize   = 60
	optDirectories   = 108
	optDirectoryBase = 112
	directorySize    = 8
	certificates     = 4
	sectionSize      = 40
	// maxKernel bounds kernel images and initrds, in bytes.
	maxKernel = 1 << 30
)

// Authenticode hashes an x86-64 PE image as firmware measures it: Windows Authenticode Portable Executable Signature
// Format, "Calculating the PE Image Hash", with SHA-384. Whatever the document leaves open (overlapping sections, parts
// outside the file) is an error, errdefs.ErrInvalidArgument.
func Authenticode(image []byte) (Digest, error) {
	le := binary.LittleEndian
	size := uint64(len(image))
	if size > maxKernel {
		return Digest{}, notPE("it has %d bytes, more than %d", size, maxKernel)
	}
	if size < dosHeaderSize || string(image[:2]) != "MZ" {
		return Digest{}, notPE("it does not start with MZ: the kernel has no EFI stub (CONFIG_EFI_STUB)")
	}
	pe := uint64(le.Uint32(image[dosPEOffset:]))
	if pe < dosHeaderSize || pe+coffSize+optDirectoryBase > size || string(image[pe:][:4]) != "PE\x00\x00" {
		return Digest{}, notPE("there is no PE header at %#x", pe)
	}
	if machine := le.Uint16(image[pe+4:]); machine != machineAMD64 {
		return Digest{}, notPE("it is for machine %#x, want x86-64 (%#x)", machine, machineAMD64)
	}
	sections, optSize := uint64(le.Uint16(image[pe+6:])), uint64(le.Uint16(image[pe+20:]))
	opt := pe + coffSize
	table := opt + optSize
	headers := uint64(le.Uint32(image[opt+optHeadersSize:]))
	directories := uint64(le.Uint32(image[opt+optDirectories:]))
	switch {
	case le.Uint16(image[opt:]) != magicPE32Plus:
		return Digest{}, notPE("its optional header is none of PE32+")
	case directories > 16 || optDirectoryBase+directories*directorySize > optSize:
		return Digest{}, notPE("%d data directories do not fit into its optional header of %d bytes", directories, optSize)
	case table+sections*sectionSize > headers || headers > size:
		return Digest{}, notPE("its headers (%d bytes, %d sections) do not fit into the %d bytes given for them, or those into the file", table,
			sections, headers)
	}

	h := sha512.New384()
	h.Write(image[:opt+optChecksum])
	at, certSize := opt+optChecksum+4, uint64(0)
	if directories > certificates {
		entry := opt + optDirectoryBase + certificates*directorySize
		certAt := uint64(le.Uint32(image[entry:]))
		if certSize = uint64(le.Uint32(image[entry+4:])); certSize != 0 && certAt+certSize != size {
			return Digest{}, notPE("its signatures (%#x bytes at %#x) are not the end of the file of %#x", certSize, certAt, size)
		}
		h.Write(image[at:entry])
		at = entry + directorySize
	}
	h.Write(image[at:headers])

	type extent struct{ start, size uint64 }
	extents := make([]extent, 0, sections)
	for n := range sections {
		s := image[table+n*sectionSize:]
		if e := (extent{uint64(le.Uint32(s[20:])), uint64(le.Uint32(s[16:]))}); e.size != 0 {
			extents = append(extents, e)
		}
	}
	slices.SortFunc(extents, func(a, b extent) int { return cmp.Compare(a.start, b.start) })
	// Firmware counts the bytes hashed and takes what is beyond that count for the rest, so a gap would shift the rest.
	end, signed := headers, size-certSize
	for _, e := range extents {
		if e.start != end || e.start+e.size > signed {
			return Digest{}, notPE("the section at %#x (%#x bytes) does not follow %#x, the end of what is in front of it, or leaves the file",
				e.start, e.size, end)
		}
		h.Write(image[e.start:][:e.size])
		end += e.size
	}
	if end > signed {
		return Digest{}, notPE("its signatures overlap its headers")
	}
	h.Write(image[end:signed])
	var d Digest
	h.Sum(d[:0])
	return d, nil
}

func notPE(format string, args ...any) error {
	return fmt.Errorf("the kernel is no PE image that firmware can start: "+format+": %w", append(args, errdefs.ErrInvalidArgument)...)
}
