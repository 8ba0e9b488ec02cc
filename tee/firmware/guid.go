// SPDX-License-Identifier: Apache-2.0

package firmware

import (
	"encoding/binary"
	"encoding/hex"
	"fmt"
)

// GUID in the byte order of UEFI: the first three fields little-endian (UEFI Specification, appendix A).
type GUID [16]byte

// GUIDs of the table: OVMF's reset vector, QEMU's docs/specs, and the Intel TDX Virtual Firmware Design Guide.
var (
	guidFooter     = MustGUID("96b582de-1fb2-45f7-baea-a366c55a082d")
	guidHashTable  = MustGUID("7255371f-3a3b-4b04-927b-1da6efa8d454")
	guidResetBlock = MustGUID("00f771de-1a7e-4fcb-890e-68c77e2fb44e")
	guidSNP        = MustGUID("dc886566-984a-4798-a75e-5585a7bf67cc")
	guidTDX        = MustGUID("e47a6535-984a-4798-865e-4685a7bf8ec2")
)

// MustGUID reads the text form, 8-4-4-4-12 hexadecimal digits. It is for constants: other text panics.
func MustGUID(text string) GUID {
	var g GUID
	if len(text) != 36 || text[8] != '-' || text[13] != '-' || text[18] != '-' || text[23] != '-' {
		panic(fmt.Sprintf("%q is no GUID", text))
	}
	b, err := hex.DecodeString(text[:8] + text[9:13] + text[14:18] + text[19:23] + text[24:])
	if err != nil {
		panic(fmt.Sprintf("%q is no GUID: %v", text, err))
	}
	binary.LittleEndian.PutUint32(g[0:], binary.BigEndian.Uint32(b[0:]))
	binary.LittleEndian.PutUint16(g[4:], binary.BigEndian.Uint16(b[4:]))
	binary.LittleEndian.PutUint16(g[6:], binary.BigEndian.Uint16(b[6:]))
	copy(g[8:], b[8:])
	return g
}

// String is the text form.
func (g GUID) String() string {
	return fmt.Sprintf("%08x-%04x-%04x-%x-%x", binary.LittleEndian.Uint32(g[0:]), binary.LittleEndian.Uint16(g[4:]),
		binary.LittleEndian.Uint16(g[6:]), g[8:10], g[10:16])
}
