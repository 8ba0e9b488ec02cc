// SPDX-License-Identifier: Apache-2.0

package tdx

import (
	"crypto/sha512"
	"encoding/binary"
	"hash"

	"github.com/cloister-project/cloister/tee/firmware"
)

// Sizes of MRTD's records: 348549, TDH.MEM.PAGE.ADD and TDH.MR.EXTEND.
const (
	recordSize = 128
	chunkSize  = 256
)

// MRTD predicts the register of a firmware image, in the order of its TDX sections. singlePass: each page is measured as
// soon as it is added (KVM since Linux 6.16). twoPass: all pages of a section are added, then measured. image is what
// parsed was parsed from.
func MRTD(image []byte, parsed *firmware.Image) (singlePass, twoPass Digest) {
	single, two := sha512.New384(), sha512.New384()
	for _, s := range parsed.TDX {
		content := image[s.DataOffset:][:s.RawSize]
		pages := s.MemSize / firmware.PageSize
		for n := range pages {
			addPage(single, s, n)
			addPage(two, s, n)
			extendPage(single, s, n, content)
		}
		for n := range pages {
			extendPage(two, s, n, content)
		}
	}
	single.Sum(singlePass[:0])
	two.Sum(twoPass[:0])
	return singlePass, twoPass
}

// addPage records the n-th page of a section. Pages that the guest accepts later leave no trace.
func addPage(h hash.Hash, s firmware.TDXSection, n uint64) {
	if s.Attributes&firmware.TDXAugment == 0 {
		record(h, "MEM.PAGE.ADD", s.MemAddress+n*firmware.PageSize)
	}
}

// extendPage measures the content of a page in chunks. What lies beyond the image's data is zero.
func extendPage(h hash.Hash, s firmware.TDXSection, n uint64, content []byte) {
	if s.Attributes&firmware.TDXExtend == 0 {
		return
	}
	var page [firmware.PageSize]byte
	if at := n * firmware.PageSize; at < uint64(len(content)) {
		copy(page[:], content[at:])
	}
	for at := 0; at < len(page); at += chunkSize {
		record(h, "MR.EXTEND", s.MemAddress+n*firmware.PageSize+uint64(at))
		h.Write(page[at:][:chunkSize])
	}
}

func record(h hash.Hash, operation string, address uint64) {
	var b [recordSize]byte
	copy(b[:16], operation)
	binary.LittleEndian.PutUint64(b[16:], address)
	h.Write(b[:])
}
