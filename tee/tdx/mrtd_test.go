// SPDX-License-Identifier: Apache-2.0

package tdx

import (
	"os"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"

	"github.com/cloister-project/cloister/tee/firmware"
)

// fileFromEnv is a file that the test's environment names; without it the test is skipped.
func fileFromEnv(t testing.TB, name string) string {
	t.Helper()
	path := os.Getenv(name)
	if path == "" {
		t.Skipf("%s names no file; the Makefile's targets set it", name)
	}
	return path
}

// The check values are published ones for Debian 12's ovmf 2022.11-6+deb12u2.
func TestMRTDOfAPublicFirmware(t *testing.T) {
	fw, err := readImage(fileFromEnv(t, "CLOISTER_TEST_OVMF"))
	require.NoError(t, err)
	require.Equal(t, "7b456907dd0786d415999e801a1ac4637b8ed4d7cf5378cfc6edbe5e574dd773", fw.digest,
		"another build of the firmware than the check values are of")
	single, two := MRTD(fw.raw, fw.parsed)
	require.Equal(t, "4c7206f0f483c524f12c366c711e9049030a8d47c471ee5aa9c4999a08de4057fb887fed0744d5631a212967fb231c47", single.String())
	require.Equal(t, "acccbcc870a381adab0d3919d90a7f268ac3b0364771f202ed4bb4e892d045b33db3b32e6924cba830a724eed443f7e1", two.String())

	found := false
	for _, s := range fw.parsed.TDX {
		if s.Type == firmware.TDXConfiguration {
			found = true
			volume := fw.raw[s.DataOffset:][:s.RawSize]
			require.Equal(t, "f87302177b059d54a2cf0c5f13340dbabf5c9dd60dc3f996c68b776fbe4de959769443a3d8ef6538b97d7e151c8298e8",
				sum(volume).String())
			require.True(t, emptyVariables(volume))
		}
	}
	require.True(t, found)
}

// A section's records in both orders, written out.
func TestMRTDRecords(t *testing.T) {
	image := make([]byte, 2*firmware.PageSize)
	for n := range image {
		image[n] = byte(n / chunkSize)
	}
	record := func(op string, address uint64) string {
		b := make([]byte, recordSize)
		copy(b, op)
		for n := range 8 {
			b[16+n] = byte(address >> (8 * n))
		}
		return string(b)
	}
	page := func(address uint64, content []byte) (s string) {
		for at := 0; at < firmware.PageSize; at += chunkSize {
			s += record("MR.EXTEND", address+uint64(at)) + string(content[at:][:chunkSize])
		}
		return s
	}
	padded := append(append([]byte(nil), image[firmware.PageSize:][:1000]...), make([]byte, firmware.PageSize-1000)...)
	parsed := &firmware.Image{TDX: []firmware.TDXSection{
		{DataOffset: 0, RawSize: firmware.PageSize + 1000, MemAddress: 0xff000, MemSize: 2 * firmware.PageSize, Attributes: firmware.TDXExtend},
		{MemAddress: 0x1000, MemSize: firmware.PageSize, Type: firmware.TDXTemporaryMemory},
		{MemAddress: 0x5000, MemSize: firmware.PageSize, Type: firmware.TDXPermanentMemory, Attributes: firmware.TDXAugment},
	}}
	single, two := MRTD(image, parsed)
	add1, add2, last := record("MEM.PAGE.ADD", 0xff000), record("MEM.PAGE.ADD", 0x100000), record("MEM.PAGE.ADD", 0x1000)
	ext1, ext2 := page(0xff000, image[:firmware.PageSize]), page(0x100000, padded)
	require.Equal(t, sum([]byte(add1+ext1+add2+ext2+last)), single)
	require.Equal(t, sum([]byte(add1+add2+ext1+ext2+last)), two)
}

func TestHandOff(t *testing.T) {
	sections := []firmware.TDXSection{
		{MemAddress: 0x810000, MemSize: 0x10000, Type: firmware.TDXTemporaryMemory},
		{MemAddress: 0x800000, MemSize: 0x6000, Type: firmware.TDXTemporaryMemory},
		{MemAddress: 0x809000, MemSize: 0x2000, Type: firmware.TDXHandOff},
		{MemAddress: 0x80b000, MemSize: 0x2000, Type: firmware.TDXTemporaryMemory},
		{MemAddress: 0xffc84000, MemSize: 0x37c000, Type: firmware.TDXBootFirmware},
	}
	hob, err := handOff(sections, 2<<30)
	require.NoError(t, err)
	require.True(t, strings.HasPrefix(sum(hob).String(), "0b8772e5b0b41b83e6044a68"), "a published example, got %s", sum(hob))
	require.Len(t, hob, hobHandOffSize+8*hobResourceSize)

	memory := func(bytes uint64) []memoryRange {
		_, ranges, err := memoryMap(sections, bytes)
		require.NoError(t, err)
		return ranges[len(ranges)-2:]
	}
	require.Equal(t, []memoryRange{{0x810000, 0x820000, hobMemory}, {0x820000, 0xaf000000, hobUnaccepted}}, memory(0xaf000000))
	require.Equal(t, []memoryRange{{0x820000, 0x80000000, hobUnaccepted}, {1 << 32, 1<<32 + 0x30000000, hobUnaccepted}}, memory(0xb0000000))
	require.Equal(t, []memoryRange{{0x820000, 0x80000000, hobUnaccepted}, {1 << 32, 3 << 31, hobUnaccepted}}, memory(4<<30))

	for name, bad := range map[string][]firmware.TDXSection{
		"no hand-off block": sections[:2],
		"two of them":       append([]firmware.TDXSection{{MemAddress: 0x1000, MemSize: 0x1000, Type: firmware.TDXHandOff}}, sections...),
		"overlapping ranges": append([]firmware.TDXSection{{MemAddress: 0x805000, MemSize: 0x2000, Type: firmware.TDXTemporaryMemory}},
			sections...),
	} {
		_, err := handOff(bad, 2<<30)
		require.ErrorIs(t, err, errdefs.ErrInvalidArgument, name)
	}
	_, err = handOff(sections, 0x81f000)
	require.ErrorIs(t, err, errdefs.ErrInvalidArgument, "memory ends inside a range")
}
