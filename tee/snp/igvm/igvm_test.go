// SPDX-License-Identifier: Apache-2.0

package igvm

import (
	"bytes"
	"encoding/binary"
	"hash/crc32"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"

	"github.com/cloister-project/cloister/tee/snp/igvm/igvmtest"
)

func fill(b byte) []byte { return bytes.Repeat([]byte{b}, PageSize) }

// whole is a file with one of everything.
func whole() *igvmtest.Builder {
	b := igvmtest.New(0x30000)
	b.Page(0xffffe000, 0, 0, fill(2))
	b.Page(0x3000, 2, 0, fill(9))
	b.Page(0x1000, 0, 0, nil)
	b.Page(0x2000, 1, 0, nil)
	b.Page(0x5000, 0, 2, fill(3))
	b.Parameters(0x4000, 7)
	b.Header(0x305, make([]byte, 24))
	b.Header(0x80000777, []byte("skipped"))
	b.VP(1, fill(0xb1))
	b.VP(0, fill(0xb0))
	return b
}

func TestParse(t *testing.T) {
	f, err := Parse(whole().Bytes())
	require.NoError(t, err)
	require.Equal(t, &File{
		Policy: 0x30000,
		Pages: []Page{
			{0x1000, Normal, nil}, {0x2000, Secrets, nil}, {0x3000, CPUID, fill(9)}, {0x4000, Unmeasured, nil}, {0x5000, Unmeasured, fill(3)},
			{0xffffe000, Normal, fill(2)},
		},
		VMSAs: [][]byte{fill(0xb0), fill(0xb1)},
	}, f)
}

// A file for several platforms: what is not SEV-SNP's is skipped.
func TestParseOtherPlatforms(t *testing.T) {
	b := new(igvmtest.Builder)
	b.Header(0x1, []byte{2, 0, 0, 0, 0, 3, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0}) // TDX, mask 2
	b.Header(0x1, []byte{1, 0, 0, 0, 0, 2, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0})
	b.Header(0x101, append(make([]byte, 8), 2, 0, 0, 0, 0, 0, 0, 0))
	b.Header(0x101, append(make([]byte, 8), 3, 0, 0, 0, 0, 0, 0, 0))
	other := make([]byte, 24)
	other[8] = 2
	b.Header(0x302, other)
	b.Header(0x303, other[:16])
	b.Header(0x304, other[:20])
	b.VP(0, fill(1))
	f, err := Parse(b.Bytes())
	require.NoError(t, err)
	require.Empty(t, f.Pages)
	require.Len(t, f.VMSAs, 1)
}

// reseal mends the checksum of a changed file.
func reseal(file []byte) []byte {
	end := fixedHeader + binary.LittleEndian.Uint32(file[12:])
	copy(file[20:24], make([]byte, 4))
	binary.LittleEndian.PutUint32(file[20:], crc32.ChecksumIEEE(file[:end]))
	return file
}

func TestParseRefuses(t *testing.T) {
	built := func(change func(*igvmtest.Builder)) []byte {
		b := whole()
		change(b)
		return b.Bytes()
	}
	changed := func(at int, to byte) []byte {
		file := whole().Bytes()
		file[at] = to
		return file
	}
	policy := append(make([]byte, 8), 1, 0, 0, 0, 0, 0, 0, 0)
	insert := func(area byte) func(*igvmtest.Builder) {
		return func(b *igvmtest.Builder) { b.Header(0x303, append(make([]byte, 8), 1, 0, 0, 0, area, 0, 0, 0)) }
	}
	platform := func(mask uint32) []byte {
		return append(binary.LittleEndian.AppendUint32(nil, mask), 0, 2, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0)
	}
	for name, tc := range map[string]struct {
		file []byte
		want string
	}{
		"empty":               {nil, "does not begin as one"},
		"firmware":            {fill(0), "does not begin as one"},
		"too long":            {make([]byte, MaxSize+1), "more than"},
		"version 2":           {changed(4, 2), "version 2"},
		"cut":                 {whole().Bytes()[:5000], "and says"},
		"headers elsewhere":   {changed(8, 32), "headers are not possible"},
		"too many headers":    {changed(15, 0xff), "headers are not possible"},
		"checksum":            {changed(30, 1), "checksum"},
		"long header":         {reseal(changed(fixedHeader+6, 1)), "are left"},
		"no platform":         {new(igvmtest.Builder).Bytes(), "not for SEV-SNP"},
		"two platforms":       {built(func(b *igvmtest.Builder) { b.Header(1, platform(2)) }), "two platforms"},
		"two policies":        {built(func(b *igvmtest.Builder) { b.Header(0x101, policy) }), "two guest policies"},
		"relocation":          {built(func(b *igvmtest.Builder) { b.Header(0x102, make([]byte, 48)) }), "type 0x102"},
		"ID block":            {built(func(b *igvmtest.Builder) { b.Header(0x30b, make([]byte, 8)) }), "ID block"},
		"short page header":   {built(func(b *igvmtest.Builder) { b.Header(0x302, make([]byte, 20)) }), "has 20 bytes, want 24"},
		"2 MiB page":          {built(func(b *igvmtest.Builder) { b.Page(0x200000, 0, 1, nil) }), "2 MiB"},
		"unknown flags":       {built(func(b *igvmtest.Builder) { b.Page(0x200000, 0, 4, nil) }), "unknown flags"},
		"unknown page":        {built(func(b *igvmtest.Builder) { b.Page(0x200000, 3, 0, nil) }), "of type 3"},
		"page between pages":  {built(func(b *igvmtest.Builder) { b.Page(0x200001, 0, 0, nil) }), "multiple of 4096"},
		"page twice":          {built(func(b *igvmtest.Builder) { b.Page(0x1000, 0, 0, nil) }), "two pages at 0x1000"},
		"page in parameters":  {built(func(b *igvmtest.Builder) { b.Page(0x4000, 0, 0, nil) }), "two pages at 0x4000"},
		"area twice":          {built(func(b *igvmtest.Builder) { b.Parameters(0x7000, 7) }), "two areas of parameters 7"},
		"insert nothing":      {built(insert(9)), "area of parameters 9"},
		"insert twice":        {built(insert(7)), "inserted before"},
		"processor twice":     {built(func(b *igvmtest.Builder) { b.VP(1, fill(1)) }), "virtual processor 1 is there twice"},
		"processor missing":   {built(func(b *igvmtest.Builder) { b.VP(3, fill(1)) }), "none with the number 2"},
		"processor nowhere":   {built(func(b *igvmtest.Builder) { b.VP(2, nil) }), "content at 0"},
		"policy first":        {reseal(append([]byte("IGVM"), bytes.Repeat([]byte{0}, 20)...)), "version 0"},
		"bytes behind header": {built(func(b *igvmtest.Builder) { b.Header(0x302, nil) }), "has 0 bytes"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := Parse(tc.file)
			require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
			require.ErrorContains(t, err, tc.want)
		})
	}
	b := igvmtest.New(1)
	_, err := Parse(b.Bytes())
	require.ErrorContains(t, err, "no virtual processor")
	b = new(igvmtest.Builder)
	b.Header(1, platform(1))
	_, err = Parse(b.Bytes())
	require.ErrorContains(t, err, "no guest policy")
	b = new(igvmtest.Builder)
	b.Page(0, 0, 0, nil)
	_, err = Parse(b.Bytes())
	require.ErrorContains(t, err, "stands before")
}

func FuzzParse(f *testing.F) {
	for _, b := range []*igvmtest.Builder{whole(), igvmtest.New(0x30000), new(igvmtest.Builder)} {
		file := b.Bytes()
		end := fixedHeader + binary.LittleEndian.Uint32(file[12:])
		f.Add(file[fixedHeader:end], file[end:])
	}
	f.Fuzz(func(t *testing.T, headers, data []byte) {
		// Lengths and checksum are made right, so that what stands behind them is reached.
		headers = append(headers, make([]byte, (8-len(headers)%8)%8)...)
		raw := append([]byte("IGVM\x01\x00\x00\x00"), make([]byte, 16)...)
		binary.LittleEndian.PutUint32(raw[8:], fixedHeader)
		binary.LittleEndian.PutUint32(raw[12:], uint32(len(headers)))
		raw = append(append(raw, headers...), data...)
		binary.LittleEndian.PutUint32(raw[16:], uint32(len(raw)))
		file, err := Parse(reseal(raw))
		if err != nil {
			require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
			return
		}
		require.NotEmpty(t, file.VMSAs)
		for i, p := range file.Pages {
			require.Zero(t, p.GPA%PageSize)
			require.True(t, p.Data == nil || len(p.Data) == PageSize)
			require.True(t, i == 0 || file.Pages[i-1].GPA < p.GPA)
		}
	})
}
