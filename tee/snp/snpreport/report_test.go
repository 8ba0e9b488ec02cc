// SPDX-License-Identifier: Apache-2.0

package snpreport

import (
	"bytes"
	"encoding/binary"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
)

// sample is a report whose byte fields are filled with numbers of their own.
func sample(version uint32) []byte {
	b := make([]byte, Size)
	u32 := func(at int, v uint32) { binary.LittleEndian.PutUint32(b[at:], v) }
	u64 := func(at int, v uint64) { binary.LittleEndian.PutUint64(b[at:], v) }
	fill := func(at, size int, v byte) { copy(b[at:], bytes.Repeat([]byte{v}, size)) }
	u32(0x00, version)
	u32(0x04, 7)
	u64(0x08, 0x30000)
	fill(0x10, 16, 1)
	fill(0x20, 16, 2)
	u32(0x30, 1)
	u32(0x34, 1)
	u64(0x38, 0x1111)
	u64(0x40, 0x2222)
	u32(0x48, 1|1<<2)
	fill(0x50, 64, 3)
	fill(0x90, 48, 4)
	fill(0xc0, 32, 5)
	fill(0xe0, 48, 6)
	fill(0x110, 48, 7)
	fill(0x140, 32, 8)
	fill(0x160, 32, 9)
	u64(0x180, 0x3333)
	if version >= 3 {
		copy(b[0x188:], []byte{0x19, 0x11, 0x01})
	}
	fill(0x1a0, 64, 10)
	u64(0x1e0, 0x4444)
	copy(b[0x1e8:], []byte{21, 55, 1})
	copy(b[0x1ec:], []byte{20, 54, 1})
	u64(0x1f0, 0x5555)
	if version >= 5 {
		u64(0x1f8, 0x6666)
		u64(0x200, 0x7777)
	}
	fill(0x2a0, 144, 11)
	return b
}

func TestParse(t *testing.T) {
	for version := uint32(MinVersion); version <= MaxVersion; version++ {
		raw := sample(version)
		r, err := Parse(raw)
		require.NoError(t, err)
		require.Equal(t, version, r.Version)
		require.Equal(t, uint32(7), r.GuestSVN)
		require.Equal(t, uint64(0x30000), r.Policy)
		require.Equal(t, uint32(1), r.VMPL)
		require.Equal(t, uint32(1), r.SignatureAlgo)
		require.True(t, r.AuthorKey)
		require.False(t, r.MaskChipKey)
		require.Equal(t, uint8(1), r.SigningKey)
		for value, field := range map[byte][]byte{1: r.FamilyID[:], 2: r.ImageID[:], 3: r.ReportData[:], 4: r.Measurement[:], 5: r.HostData[:],
			6: r.IDKeyDigest[:],
			7: r.AuthorKeyDigest[:], 8: r.ReportID[:], 9: r.ReportIDMA[:], 10: r.ChipID[:], 11: r.Signature[:144]} {
			require.Equal(t, bytes.Repeat([]byte{value}, len(field)), field, "field %d", value)
		}
		require.Equal(t, []uint64{0x1111, 0x2222, 0x3333, 0x4444, 0x5555},
			[]uint64{r.CurrentTCB, r.PlatformInfo, r.ReportedTCB, r.CommittedTCB, r.LaunchTCB})
		require.Equal(t, [3]uint8{21, 55, 1}, r.CurrentBuild)
		require.Equal(t, [3]uint8{20, 54, 1}, r.CommittedBuild)
		require.Equal(t, version >= 3, r.CPU == [3]uint8{0x19, 0x11, 0x01})
		require.Equal(t, version >= 5, r.LaunchMitigations == 0x6666 && r.CurrentMitigations == 0x7777)
		require.Equal(t, raw[:0x2a0], r.Signed)
	}
}

func TestParseRefuses(t *testing.T) {
	for _, tt := range []struct {
		want   string
		change func([]byte) []byte
	}{
		{"0 bytes", func([]byte) []byte { return nil }},
		{"1183 bytes", func(b []byte) []byte { return b[1:] }},
		{"1185 bytes", func(b []byte) []byte { return append(b, 0) }},
		{"version 1;", set(0, 1)},
		{"version 6;", set(0, 6)},
		{"reserved bits", set(0x49, 1)},
		{"lacks bit 17", set(0x0a, 1)},
		{"VMPL 4", set(0x30, 4)},
		{"reserved bytes 0x4c to 0x4f", set(0x4f, 1)},
		{"reserved bytes 0x188 to 0x19f", set(0x188, 1)},
		{"reserved bytes 0x1eb to 0x1eb", set(0x1eb, 1)},
		{"reserved bytes 0x1ef to 0x1ef", set(0x1ef, 1)},
		{"reserved bytes 0x1f8 to 0x29f", set(0x29f, 1)},
		{"behind its signature", set(0x330, 1)},
	} {
		r, err := Parse(tt.change(sample(2)))
		require.ErrorContains(t, err, tt.want)
		require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
		require.Nil(t, r)
	}
	_, err := Parse(set(0x18b, 1)(sample(3)))
	require.ErrorContains(t, err, "reserved bytes 0x18b to 0x19f")
	_, err = Parse(set(0x208, 1)(sample(5)))
	require.ErrorContains(t, err, "reserved bytes 0x208 to 0x29f")
}

func set(at int, value byte) func([]byte) []byte {
	return func(b []byte) []byte {
		b[at] = value
		return b
	}
}

// FuzzParse changes single bytes of a report, which finds more than whole reports made by chance: edits are an offset
// (two bytes, little-endian) and a value each.
func FuzzParse(f *testing.F) {
	f.Add(uint32(2), 0, []byte{})
	f.Add(uint32(5), 0, []byte{0xf8, 0x01, 0xff, 0x90, 0x00, 0xff})
	f.Add(uint32(3), 1, []byte{0x4c, 0x00, 1})
	f.Fuzz(func(t *testing.T, version uint32, cut int, edits []byte) {
		raw := sample(version)
		for ; len(edits) >= 3; edits = edits[3:] {
			raw[int(binary.LittleEndian.Uint16(edits))%Size] = edits[2]
		}
		if cut > 0 && cut <= Size {
			raw = raw[cut:]
		}
		before := bytes.Clone(raw)
		r, err := Parse(raw)
		require.True(t, bytes.Equal(before, raw))
		if err != nil {
			require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
			require.Nil(t, r)
			return
		}
		require.True(t, bytes.Equal(raw[0x90:0xc0], r.Measurement[:]))
		require.True(t, bytes.Equal(raw[0xc0:0xe0], r.HostData[:]))
	})
}
