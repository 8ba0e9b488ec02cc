// SPDX-License-Identifier: Apache-2.0

package firmwaretest

import (
	"encoding/binary"
	"math/rand/v2"

	"github.com/cloister-project/cloister/tee/firmware"
)

// Image to build. The zero value is an image without any table entry.
type Image struct {
	// Pages of 4 KiB; 0: two, of which the last holds the tables.
	Pages int
	// HashTable, ResetEIP, SNP and TDX become entries if set.
	HashTable *firmware.Area
	ResetEIP  uint32
	SNP       []firmware.SNPSection
	TDX       []firmware.TDXSection
	// Extra entries of the table, in front of the others.
	Extra []firmware.Entry
}

// SNP is an image that a launch with kernel hashes accepts: sections as OVMF's, at lower counts of pages.
func SNP() Image {
	return Image{
		HashTable: &firmware.Area{Base: 0x810c00, Size: 0x400},
		ResetEIP:  0x80b004,
		SNP: []firmware.SNPSection{
			{Base: 0x800000, Size: 0x2000, Type: firmware.SNPMemory},
			{Base: 0x80d000, Size: 0x1000, Type: firmware.SNPSecrets},
			{Base: 0x80e000, Size: 0x1000, Type: firmware.SNPCPUID},
			{Base: 0x80f000, Size: 0x1000, Type: firmware.SNPSVSMCAA},
			{Base: 0x811000, Size: 0x1000, Type: firmware.SNPMemory},
			{Base: 0x810000, Size: 0x1000, Type: firmware.SNPKernelHashes},
		},
	}
}

// Bytes of the image. What is no table is filled with the same pseudo-random bytes each time.
func (i Image) Bytes() []byte {
	pages := i.Pages
	if pages == 0 {
		pages = 2
	}
	image := make([]byte, pages*firmware.PageSize)
	rng := rand.New(rand.NewPCG(1, 2))
	for n := range image {
		image[n] = byte(rng.Uint32())
	}

	var table []byte
	add := func(guid firmware.GUID, data []byte) {
		table = append(table, data...)
		table = binary.LittleEndian.AppendUint16(table, uint16(len(data)+18))
		table = append(table, guid[:]...)
	}
	for _, e := range i.Extra {
		add(e.GUID, e.Data)
	}
	// The metadata lie at fixed places in front of the largest table that can be.
	const snpOffset, tdxOffset = 0x800, 0xe00
	if i.TDX != nil {
		add(firmware.MustGUID("e47a6535-984a-4798-865e-4685a7bf8ec2"), binary.LittleEndian.AppendUint32(nil, tdxOffset))
		copy(image[len(image)-tdxOffset:], tdxMetadata(i.TDX))
	}
	if i.SNP != nil {
		add(firmware.MustGUID("dc886566-984a-4798-a75e-5585a7bf67cc"), binary.LittleEndian.AppendUint32(nil, snpOffset))
		copy(image[len(image)-snpOffset:], snpMetadata(i.SNP))
	}
	if i.HashTable != nil {
		data := binary.LittleEndian.AppendUint32(nil, i.HashTable.Base)
		add(firmware.MustGUID("7255371f-3a3b-4b04-927b-1da6efa8d454"), binary.LittleEndian.AppendUint32(data, i.HashTable.Size))
	}
	if i.ResetEIP != 0 {
		add(firmware.MustGUID("00f771de-1a7e-4fcb-890e-68c77e2fb44e"), binary.LittleEndian.AppendUint32(nil, i.ResetEIP))
	}
	table = binary.LittleEndian.AppendUint16(table, uint16(len(table)+18))
	footer := firmware.MustGUID("96b582de-1fb2-45f7-baea-a366c55a082d")
	table = append(table, footer[:]...)
	copy(image[len(image)-32-len(table):], table)
	return image
}

func header(signature string, count, section int) []byte {
	b := []byte(signature)
	b = binary.LittleEndian.AppendUint32(b, uint32(16+count*section))
	b = binary.LittleEndian.AppendUint32(b, 1)
	return binary.LittleEndian.AppendUint32(b, uint32(count))
}

func snpMetadata(sections []firmware.SNPSection) []byte {
	b := header("ASEV", len(sections), 12)
	for _, s := range sections {
		b = binary.LittleEndian.AppendUint32(b, s.Base)
		b = binary.LittleEndian.AppendUint32(b, s.Size)
		b = binary.LittleEndian.AppendUint32(b, uint32(s.Type))
	}
	return b
}

func tdxMetadata(sections []firmware.TDXSection) []byte {
	b := header("TDVF", len(sections), 32)
	for _, s := range sections {
		b = binary.LittleEndian.AppendUint32(b, s.DataOffset)
		b = binary.LittleEndian.AppendUint32(b, s.RawSize)
		b = binary.LittleEndian.AppendUint64(b, s.MemAddress)
		b = binary.LittleEndian.AppendUint64(b, s.MemSize)
		b = binary.LittleEndian.AppendUint32(b, uint32(s.Type))
		b = binary.LittleEndian.AppendUint32(b, s.Attributes)
	}
	return b
}
