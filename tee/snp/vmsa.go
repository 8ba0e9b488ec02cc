// SPDX-License-Identifier: Apache-2.0

package snp

import "encoding/binary"

// bspEIP is the reset vector, where the first virtual CPU starts.
const bspEIP = 0xfffffff0

// segment register of a VMSA: AMD64 Architecture Programmer's Manual volume 2, appendix B; the attributes as in VMCBs.
type segment struct {
	offset   int
	selector uint16
	attrs    uint16
	base     uint64
}

// vmsa is the initial state of a virtual CPU that starts at eip, as QEMU and KVM make it: the processor's state after a
// reset (volume 2, section 14.1), what KVM switches on for SVM, and RDX with the CPU model's signature. Offsets are
// those of volume 2, appendix B, state save area for SEV-ES.
func vmsa(eip uint32, signature uint32, features uint64) []byte {
	page := make([]byte, pageSize)
	const data, code, ldt, busyTSS = 0x93, 0x9b, 0x82, 0x8b
	for _, s := range []segment{
		{offset: 0x00, attrs: data}, // es
		{offset: 0x10, attrs: code, selector: 0xf000, base: uint64(eip & 0xffff0000)}, // cs
		{offset: 0x20, attrs: data},    // ss
		{offset: 0x30, attrs: data},    // ds
		{offset: 0x40, attrs: data},    // fs
		{offset: 0x50, attrs: data},    // gs
		{offset: 0x60},                 // gdtr
		{offset: 0x70, attrs: ldt},     // ldtr
		{offset: 0x80},                 // idtr
		{offset: 0x90, attrs: busyTSS}, // tr
	} {
		binary.LittleEndian.PutUint16(page[s.offset:], s.selector)
		binary.LittleEndian.PutUint16(page[s.offset+2:], s.attrs)
		binary.LittleEndian.PutUint32(page[s.offset+4:], 0xffff)
		binary.LittleEndian.PutUint64(page[s.offset+8:], s.base)
	}
	for _, r := range []struct {
		offset int
		value  uint64
	}{
		{0x0d0, 0x1000},               // efer: SVME
		{0x148, 0x40},                 // cr4: MCE
		{0x158, 0x10},                 // cr0: ET
		{0x160, 0x400},                // dr7
		{0x168, 0xffff0ff0},           // dr6
		{0x170, 0x2},                  // rflags
		{0x178, uint64(eip & 0xffff)}, // rip
		{0x268, 0x0007040600070406},   // g_pat
		{0x310, uint64(signature)},    // rdx
		{0x3b0, features},             // sev_features
		{0x3e8, 0x1},                  // xcr0: x87
	} {
		binary.LittleEndian.PutUint64(page[r.offset:], r.value)
	}
	binary.LittleEndian.PutUint32(page[0x408:], 0x1f80) // mxcsr
	binary.LittleEndian.PutUint16(page[0x410:], 0x37f)  // x87 control word
	return page
}
