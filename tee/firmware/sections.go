// SPDX-License-Identifier: Apache-2.0

package firmware

import (
	"encoding/binary"
	"fmt"
)

// SNPSectionType says what a launcher does with a section of the SNP metadata (OVMF's SEV metadata, version 1).
type SNPSectionType uint32

// SNP section types.
const (
	// SNPMemory is memory that the firmware uses before it can accept any: zero pages.
	SNPMemory SNPSectionType = 1
	// SNPSecrets is the secrets page.
	SNPSecrets SNPSectionType = 2
	// SNPCPUID is the CPUID page.
	SNPCPUID SNPSectionType = 3
	// SNPSVSMCAA is the calling area of a service module: zero pages without one.
	SNPSVSMCAA SNPSectionType = 4
	// SNPKernelHashes is the page that holds the hash table of kernel, initrd and parameters.
	SNPKernelHashes SNPSectionType = 0x10
)

// String names the type.
func (t SNPSectionType) String() string {
	switch t {
	case SNPMemory:
		return "SEC_MEM"
	case SNPSecrets:
		return "SECRETS"
	case SNPCPUID:
		return "CPUID"
	case SNPSVSMCAA:
		return "SVSM_CAA"
	case SNPKernelHashes:
		return "KERNEL_HASHES"
	}
	return fmt.Sprintf("type %#x", uint32(t))
}

// SNPSection is a range of guest memory, whole pages; Size may be 0.
type SNPSection struct {
	Base, Size uint32
	Type       SNPSectionType
}

const snpSectionSize = 12

func readSNP(image []byte, offset uint32) ([]SNPSection, error) {
	raw, err := metadata(image, offset, "ASEV", snpSectionSize)
	if err != nil {
		return nil, err
	}
	var sections []SNPSection
	var spans []span
	for ; len(raw) > 0; raw = raw[snpSectionSize:] {
		s := SNPSection{
			Base: binary.LittleEndian.Uint32(raw),
			Size: binary.LittleEndian.Uint32(raw[4:]),
			Type: SNPSectionType(binary.LittleEndian.Uint32(raw[8:])),
		}
		sections = append(sections, s)
		spans = append(spans, span{uint64(s.Base), uint64(s.Size)})
	}
	// The image itself occupies the end of these 4 GiB and is measured on its own.
	if err := checkSpans(spans, fourGiB-uint64(len(image))); err != nil {
		return nil, err
	}
	return sections, nil
}

// TDXSectionType says what a section of the TDX metadata is (Intel TDX Virtual Firmware Design Guide, section 11).
type TDXSectionType uint32

// TDX section types.
const (
	TDXBootFirmware    TDXSectionType = 0 // BFV: code
	TDXConfiguration   TDXSectionType = 1 // CFV: variables
	TDXHandOff         TDXSectionType = 2 // TD_HOB
	TDXTemporaryMemory TDXSectionType = 3
	TDXPermanentMemory TDXSectionType = 4
	TDXPayload         TDXSectionType = 5
	TDXPayloadParams   TDXSectionType = 6
)

// String names the type.
func (t TDXSectionType) String() string {
	switch t {
	case TDXBootFirmware:
		return "BFV"
	case TDXConfiguration:
		return "CFV"
	case TDXHandOff:
		return "TD_HOB"
	case TDXTemporaryMemory:
		return "TempMem"
	case TDXPermanentMemory:
		return "PermMem"
	case TDXPayload:
		return "Payload"
	case TDXPayloadParams:
		return "PayloadParam"
	}
	return fmt.Sprintf("type %#x", uint32(t))
}

// Bits of TDXSection.Attributes.
const (
	// TDXExtend: the section's content is measured into MRTD.
	TDXExtend uint32 = 1 << 0
	// TDXAugment: the pages are added after the TD is built; they are not measured.
	TDXAugment uint32 = 1 << 1
)

// TDXSection maps a part of the image (RawSize bytes at DataOffset, inside the image; none if 0) to guest memory (MemSize
// bytes at MemAddress, whole pages, at least RawSize).
type TDXSection struct {
	DataOffset, RawSize uint32
	MemAddress, MemSize uint64
	Type                TDXSectionType
	Attributes          uint32
}

const (
	tdxSectionSize = 32
	// tdxAddressLimit is the end of the smallest guest-physical address space that a TD can have.
	tdxAddressLimit = 1 << 47
)

func readTDX(image []byte, offset uint32) ([]TDXSection, error) {
	raw, err := metadata(image, offset, "TDVF", tdxSectionSize)
	if err != nil {
		return nil, err
	}
	var sections []TDXSection
	var spans []span
	for ; len(raw) > 0; raw = raw[tdxSectionSize:] {
		s := TDXSection{
			DataOffset: binary.LittleEndian.Uint32(raw),
			RawSize:    binary.LittleEndian.Uint32(raw[4:]),
			MemAddress: binary.LittleEndian.Uint64(raw[8:]),
			MemSize:    binary.LittleEndian.Uint64(raw[16:]),
			Type:       TDXSectionType(binary.LittleEndian.Uint32(raw[24:])),
			Attributes: binary.LittleEndian.Uint32(raw[28:]),
		}
		switch n := len(sections); {
		case uint64(s.DataOffset)+uint64(s.RawSize) > uint64(len(image)):
			return nil, malformed("section %d: its data, %#x bytes at %#x, reach beyond the image", n, s.RawSize, s.DataOffset)
		case uint64(s.RawSize) > s.MemSize:
			return nil, malformed("section %d: %#x bytes of data do not fit into %#x bytes of memory", n, s.RawSize, s.MemSize)
		case s.Attributes&^(TDXExtend|TDXAugment) != 0:
			return nil, malformed("section %d: attributes %#x have unknown bits", n, s.Attributes)
		case s.Attributes == TDXExtend|TDXAugment:
			return nil, malformed("section %d is to be measured and to be added later, which exclude each other", n)
		}
		sections = append(sections, s)
		spans = append(spans, span{s.MemAddress, s.MemSize})
	}
	if err := checkSpans(spans, tdxAddressLimit); err != nil {
		return nil, err
	}
	return sections, nil
}
