// SPDX-License-Identifier: Apache-2.0

package firmware_test

import (
	"encoding/binary"
	"os"
	"slices"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"

	"github.com/cloister-project/cloister/tee/firmware"
	"github.com/cloister-project/cloister/tee/firmware/firmwaretest"
)

// tdxSections are those of a TDX image of two pages.
var tdxSections = []firmware.TDXSection{
	{DataOffset: 0x1000, RawSize: 0x1000, MemAddress: 0xfffff000, MemSize: 0x1000, Type: firmware.TDXBootFirmware,
		Attributes: firmware.TDXExtend},
	{DataOffset: 0, RawSize: 0x1000, MemAddress: 0xffffe000, MemSize: 0x1000, Type: firmware.TDXConfiguration},
	{MemAddress: 0x809000, MemSize: 0x2000, Type: firmware.TDXHandOff},
	{MemAddress: 0x80b000, MemSize: 0x2000, Type: firmware.TDXTemporaryMemory},
}

func TestParseReadsWhatTheImageSays(t *testing.T) {
	spec := firmwaretest.SNP()
	spec.Pages = 3
	spec.TDX = tdxSections
	spec.Extra = []firmware.Entry{{GUID: firmware.MustGUID("784fa70e-3176-4677-8a20-04b68699e374"), Data: []byte{1, 2, 3, 4}}}
	image, err := firmware.Parse(spec.Bytes())
	require.NoError(t, err)
	require.Equal(t, uint64(3*4096), image.Size)
	require.Equal(t, uint64(0xffffd000), image.Base())
	require.Equal(t, spec.HashTable, image.HashTable)
	require.True(t, image.HasReset)
	require.Equal(t, uint32(0x80b004), image.ResetEIP)
	require.Equal(t, spec.SNP, image.SNP)
	require.Equal(t, spec.TDX, image.TDX)
	require.Len(t, image.Entries, 5)
	require.Equal(t, "00f771de-1a7e-4fcb-890e-68c77e2fb44e", image.Entries[0].GUID.String(), "read from the end")
	require.Equal(t, spec.Extra[0], image.Entries[4], "unknown entries are kept")
}

func TestParseOfAnImageWithoutEntries(t *testing.T) {
	image, err := firmware.Parse(firmwaretest.Image{}.Bytes())
	require.NoError(t, err)
	require.Empty(t, image.Entries)
	require.Nil(t, image.HashTable)
	require.False(t, image.HasReset)
	require.Nil(t, image.SNP)
	require.Nil(t, image.TDX)
}

func TestAHashTableOfZerosIsNone(t *testing.T) {
	image, err := firmware.Parse(firmwaretest.Image{HashTable: &firmware.Area{}}.Bytes())
	require.NoError(t, err)
	require.Len(t, image.Entries, 1)
	require.Nil(t, image.HashTable)
}

// replace writes bytes at a place counted from the image's end.
func replace(image []byte, fromEnd int, with ...byte) []byte {
	copy(image[len(image)-fromEnd:], with)
	return image
}

func TestParseRefuses(t *testing.T) {
	snp := func(sections ...firmware.SNPSection) []byte { return firmwaretest.Image{SNP: sections}.Bytes() }
	tdx := func(change func(*firmware.TDXSection)) []byte {
		s := tdxSections[0]
		change(&s)
		return firmwaretest.Image{TDX: []firmware.TDXSection{s}}.Bytes()
	}
	guid := firmware.MustGUID("7255371f-3a3b-4b04-927b-1da6efa8d454")
	many := make([]firmware.SNPSection, 65)
	// Places in the images that firmwaretest builds: the footer's length, 50 bytes from the end; the first entry's
	// length, 68; the metadata, 0x800 and 0xe00.
	for _, tt := range []struct {
		name, want string
		image      []byte
	}{
		{"nothing", "0 bytes", nil},
		{"less than a page", "4095 bytes", make([]byte, 4095)},
		{"no whole pages", "4097 bytes", make([]byte, 4097)},
		{"too large", "more than 16777216", make([]byte, firmware.MaxSize+4096)},
		{"no footer", "no table of entries", make([]byte, 4096)},
		{"a table shorter than its footer", "claims to have 17 bytes", replace(firmwaretest.SNP().Bytes(), 50, 17, 0)},
		{"a table larger than the limit", "claims to have 4097 bytes", replace(firmwaretest.SNP().Bytes(), 50, 1, 0x10)},
		{"a table larger than the image", "claims to have 4090 bytes, possible are 18 to 4064",
			replace(firmwaretest.Image{Pages: 1}.Bytes(), 50, 0xfa, 0x0f)},
		{"a remainder", "17 bytes are left over", replace(firmwaretest.Image{}.Bytes(), 50, 18+17, 0)},
		{"an entry shorter than its own end", "claims to have 0 bytes", replace(firmwaretest.SNP().Bytes(), 68, 0, 0)},
		{"an entry larger than the table", "claims to have 255 bytes", replace(firmwaretest.SNP().Bytes(), 68, 255, 0)},
		{"an entry twice", "two entries 7255371f", firmwaretest.Image{HashTable: &firmware.Area{Base: 1, Size: 1},
			Extra: []firmware.Entry{{GUID: guid, Data: make([]byte, 8)}}}.Bytes()},
		{"an entry of another size", "has 7 bytes, want 8", firmwaretest.Image{Extra: []firmware.Entry{{GUID: guid,
			Data: make([]byte, 7)}}}.Bytes()},
		{"a hash table without size", "one of them is zero", firmwaretest.Image{HashTable: &firmware.Area{Base: 4096}}.Bytes()},
		{"a hash table without base", "one of them is zero", firmwaretest.Image{HashTable: &firmware.Area{Size: 4096}}.Bytes()},
		{"a hash table beyond 4 GiB", "beyond 4 GiB", firmwaretest.Image{HashTable: &firmware.Area{Base: 0xffffffff, Size: 2}}.Bytes()},
		{"metadata of another signature", `no "ASEV"`, replace(firmwaretest.SNP().Bytes(), 0x800, 'B')},
		{"metadata of another version", "version 2", replace(firmwaretest.SNP().Bytes(), 0x800-8, 2)},
		{"metadata without sections", "0 sections", replace(firmwaretest.SNP().Bytes(), 0x800-12, 0)},
		{"metadata of too many sections", "65 sections", snp(many...)},
		{"metadata whose length and count differ", "76 bytes for 6 sections, want 88", replace(firmwaretest.SNP().Bytes(), 0x800-4, 76)},
		{"metadata beyond the image", "before the end of an image",
			firmwaretest.Image{Extra: []firmware.Entry{{GUID: firmware.MustGUID("dc886566-984a-4798-a75e-5585a7bf67cc"),
				Data: binary.LittleEndian.AppendUint32(nil, 0x2001)}}}.Bytes()},
		{"metadata at the very end", "before the end of an image",
			firmwaretest.Image{Extra: []firmware.Entry{{GUID: firmware.MustGUID("e47a6535-984a-4798-865e-4685a7bf8ec2"),
				Data: make([]byte, 4)}}}.Bytes()},
		{"an SNP section of half a page", "whole pages", snp(firmware.SNPSection{Base: 0x1000, Size: 0x800, Type: firmware.SNPMemory})},
		{"an SNP section at half a page", "whole pages", snp(firmware.SNPSection{Base: 0x1800, Size: 0x1000, Type: firmware.SNPMemory})},
		{"an SNP section in the image", "beyond 0xffffe000", snp(firmware.SNPSection{Base: 0xffffd000, Size: 0x2000, Type: firmware.SNPMemory})},
		{"SNP sections that overlap", "sections 0 and 1 overlap", snp(
			firmware.SNPSection{Base: 0x1000, Size: 0x2000, Type: firmware.SNPMemory}, firmware.SNPSection{Base: 0x2000, Size: 0x1000,
				Type: firmware.SNPCPUID})},
		{"an SNP section too large to be measured", "more than 256 MiB",
			snp(firmware.SNPSection{Base: 0x1000, Size: 0x10001000, Type: firmware.SNPMemory})},
		{"TDX data beyond the image", "reach beyond the image", tdx(func(s *firmware.TDXSection) { s.DataOffset = 0x1001 })},
		{"TDX data that does not fit", "do not fit", tdx(func(s *firmware.TDXSection) { s.MemSize = 0 })},
		{"TDX attributes that are not known", "unknown bits", tdx(func(s *firmware.TDXSection) { s.Attributes = 4 })},
		{"TDX attributes that exclude each other", "exclude each other", tdx(func(s *firmware.TDXSection) { s.Attributes = 3 })},
		{"a TDX section at half a page", "whole pages", tdx(func(s *firmware.TDXSection) { s.MemAddress = 0x800 })},
		{"a TDX section whose end wraps around", "beyond 0x800000000000",
			tdx(func(s *firmware.TDXSection) { s.MemAddress = 0xfffffffffffff000 })},
		{"a TDX section larger than the address space", "beyond 0x800000000000",
			tdx(func(s *firmware.TDXSection) { s.MemSize = 0xfffffffffffff000 })},
	} {
		t.Run(tt.name, func(t *testing.T) {
			image, err := firmware.Parse(tt.image)
			require.ErrorContains(t, err, tt.want)
			require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
			require.Nil(t, image)
		})
	}
}

func realImage(t *testing.T, variable string) *firmware.Image {
	t.Helper()
	path := os.Getenv(variable)
	if path == "" {
		t.Skipf("%s is not set", variable)
	}
	raw, _, err := firmware.ReadFile(path, firmware.MaxSize)
	require.NoError(t, err)
	image, err := firmware.Parse(raw)
	require.NoError(t, err)
	return image
}

func TestTheAmdSevImage(t *testing.T) {
	image := realImage(t, "CLOISTER_TEST_OVMF_AMDSEV")
	require.Equal(t, &firmware.Area{Base: 0x810c00, Size: 0x400}, image.HashTable)
	require.True(t, image.HasReset)
	require.Contains(t, image.SNP, firmware.SNPSection{Base: 0x810000, Size: 0x1000, Type: firmware.SNPKernelHashes})
}

func TestThePlainImage(t *testing.T) {
	image := realImage(t, "CLOISTER_TEST_OVMF")
	require.Equal(t, []firmware.SNPSection{
		{Base: 0x800000, Size: 0x9000, Type: firmware.SNPMemory},
		{Base: 0x80a000, Size: 0x3000, Type: firmware.SNPMemory},
		{Base: 0x80d000, Size: 0x1000, Type: firmware.SNPSecrets},
		{Base: 0x80e000, Size: 0x1000, Type: firmware.SNPCPUID},
		{Base: 0x80f000, Size: 0x11000, Type: firmware.SNPMemory},
	}, image.SNP)
	require.Nil(t, image.HashTable)
	require.Len(t, image.TDX, 6)
	require.Equal(t, firmware.TDXSection{DataOffset: 0x20000, RawSize: 0x1e0000, MemAddress: 0xffe20000, MemSize: 0x1e0000,
		Type: firmware.TDXBootFirmware, Attributes: firmware.TDXExtend}, image.TDX[0])
}

func TestTheTDXImage(t *testing.T) {
	image := realImage(t, "CLOISTER_TEST_OVMF_INTELTDX")
	require.Nil(t, image.HashTable, "this build has zeros in its place")
	require.Len(t, image.TDX, 6)
	require.Equal(t, "CFV", image.TDX[1].Type.String())
}

// FuzzParse changes single bytes of an image's last page, where the tables are: edits are a place counted from the end
// (two bytes, little-endian) and a value each. cut takes bytes away at the front.
func FuzzParse(f *testing.F) {
	both := firmwaretest.SNP()
	both.TDX = tdxSections
	images := [][]byte{
		both.Bytes(),
		firmwaretest.Image{Pages: 1, HashTable: &firmware.Area{}}.Bytes(),
		firmwaretest.Image{Pages: 1, SNP: []firmware.SNPSection{{}, {Base: 0x1000, Size: 0x1000, Type: 9}}}.Bytes(),
	}
	f.Add(0, 0, []byte{})
	f.Add(0, 4096, []byte{0xfc, 0x07, 76})
	f.Add(1, 1, []byte{50, 0, 17, 49, 0, 0})
	f.Add(2, 0, []byte{0x00, 0x08, 'B', 0xf0, 0x07, 0xff})
	f.Fuzz(func(t *testing.T, which, cut int, edits []byte) {
		raw := slices.Clone(images[uint(which)%uint(len(images))])
		for ; len(edits) >= 3; edits = edits[3:] {
			raw[len(raw)-1-int(binary.LittleEndian.Uint16(edits))%4096] = edits[2]
		}
		if cut > 0 && cut <= len(raw) {
			raw = raw[cut:]
		}
		image, err := firmware.Parse(raw)
		if err != nil {
			require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
			require.Nil(t, image)
			return
		}
		// What a reader of the result relies on without looking again.
		require.Equal(t, uint64(len(raw)), image.Size)
		for _, s := range image.SNP {
			require.LessOrEqual(t, uint64(s.Base)+uint64(s.Size), image.Base())
			require.Zero(t, s.Base%4096+s.Size%4096)
		}
		for _, s := range image.TDX {
			require.LessOrEqual(t, uint64(s.DataOffset)+uint64(s.RawSize), image.Size)
			require.LessOrEqual(t, uint64(s.RawSize), s.MemSize)
			require.LessOrEqual(t, s.MemAddress+s.MemSize, uint64(1)<<47)
		}
	})
}
