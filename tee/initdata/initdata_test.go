// SPDX-License-Identifier: Apache-2.0

package initdata

import (
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/base64"
	"encoding/binary"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
)

const sample = `version = "0.1.0"
algorithm = "sha384"
[data]
"aa.toml" = '''
[token]
url = "https://kbs.example"
'''
"policy" = "allow nothing"
`

func TestParse(t *testing.T) {
	d, err := Parse([]byte(sample))
	require.NoError(t, err)
	require.Equal(t, SHA384, d.Algorithm)
	require.Equal(t, "allow nothing", d.Data["policy"])
	require.Contains(t, d.Data["aa.toml"], "https://kbs.example")
	sum := sha512.Sum384([]byte(sample))
	require.Equal(t, sum[:], d.Digest(), "of the text as it is")

	for spelling, size := range map[string]int{"sha256": 32, "SHA-256": 32, "sha-384": 48, "sha512": 64, "sha-512": 64} {
		d, err := Parse([]byte(strings.Replace(sample, "sha384", spelling, 1)))
		require.NoError(t, err, spelling)
		require.Len(t, d.Digest(), size)
	}
	d, err = Parse([]byte("version = \"0.1.0\"\nalgorithm = \"sha256\"\ndata = { \"a.toml\" = \"x\" }\n"))
	require.NoError(t, err)
	require.Equal(t, map[string]string{"a.toml": "x"}, d.Data)
	small := []byte("version = \"0.1.0\"\nalgorithm = \"sha256\"\n")
	d, err = Parse(small)
	require.NoError(t, err)
	require.Empty(t, d.Data)
	require.Equal(t, sha256.Sum256(small), [32]byte(d.Digest()))
}

func TestParseRefuses(t *testing.T) {
	many := "version = \"0.1.0\"\nalgorithm = \"sha256\"\n[data]\n"
	for i := range MaxEntries + 1 {
		many += "e" + strings.Repeat("x", i) + " = \"\"\n"
	}
	for name, tc := range map[string]struct{ text, says string }{
		"unknown algorithm":   {strings.Replace(sample, "sha384", "md5", 1), `algorithm "md5"`},
		"no algorithm":        {"version = \"0.1.0\"\n", `algorithm ""`},
		"two dashes":          {strings.Replace(sample, "sha384", "sha--384", 1), "algorithm"},
		"unknown version":     {strings.Replace(sample, "0.1.0", "0.2.0", 1), `version "0.2.0"`},
		"no version":          {"algorithm = \"sha256\"\n", "version"},
		"unknown key":         {sample + "[more]\nx = ''\n", `"more`},
		"entry is no text":    {sample + "number = 1\n", "TOML"},
		"not TOML":            {"version: 0.1.0", "TOML"},
		"not UTF-8":           {"\xff", "UTF-8"},
		"too many entries":    {many, "entries"},
		"an entry's name":     {sample + `"" = "x"`, "name"},
		"a long entry's name": {sample + strings.Repeat("n", MaxName+1) + ` = "x"`, "name"},
		"a number":            {"algorithm = 1\n", "TOML"},
		"in tables":           {strings.Repeat("[[a]]\n", MaxRaw/6), "array of tables"}, // minutes without checkShape
		"many tables":         {strings.Repeat("[data]\n", MaxRaw/7), "keys and tables"},
		"many keys":           {strings.Repeat("a=''\n", MaxRaw/5), "keys and tables"},
		"deep key":            {strings.Repeat("a.", MaxRaw/2-8) + "b=''", "two parts"},
		"deep table":          {"[" + strings.Repeat("a.", MaxRaw/2-8) + "b]", "two parts"},
		"deep array":          {"data = " + strings.Repeat("[", MaxRaw-16), "nested"},
		"deep inline":         {"data = " + strings.Repeat("{a=", MaxRaw/3-16), "nested"},
		"wide inline":         {"data = {" + strings.Repeat("a='',", MaxRaw/5-16) + "b=''}", "inline table"},
		"deep inline key":     {"data = {" + strings.Repeat("a.", MaxRaw/2-16) + "b=''}", "inline table"},
		"twice":               {sample + "policy = \"deny\"", "TOML"},
		"too long":            {sample + "# " + strings.Repeat("x", MaxRaw), "limit"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := Parse([]byte(tc.text))
			require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
			require.ErrorContains(t, err, tc.says)
		})
	}
}

func TestBind(t *testing.T) {
	require.Equal(t, []byte{1, 2, 3, 0, 0}, Bind([]byte{1, 2, 3}, 5))
	require.Equal(t, []byte{1, 2}, Bind([]byte{1, 2, 3}, 2))
}

func TestAnnotation(t *testing.T) {
	value, err := EncodeAnnotation([]byte(sample))
	require.NoError(t, err)
	raw, err := DecodeAnnotation(value + "\n")
	require.NoError(t, err)
	require.Equal(t, sample, string(raw))

	for name, tc := range map[string]struct{ value, says string }{
		"not base64": {"***", "base64"},
		"not gzip":   {base64.StdEncoding.EncodeToString([]byte("text")), "gzip"},
		"empty":      {"", "gzip"},
		"too long":   {strings.Repeat("A", MaxAnnotation+4), "limit"},
		"a bomb":     {base64.StdEncoding.EncodeToString(zip(t, make([]byte, 4*MaxRaw))), "larger than"},
		"cut off":    {base64.StdEncoding.EncodeToString(zip(t, []byte(sample))[:40]), "unpacked"},
		"two members": {base64.StdEncoding.EncodeToString(append(zip(t, []byte("a")), zip(t, []byte("b"))...)),
			"behind"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := DecodeAnnotation(tc.value)
			require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
			require.ErrorContains(t, err, tc.says)
		})
	}
}

func TestDisk(t *testing.T) {
	var disk bytes.Buffer
	require.NoError(t, WriteDisk(&disk, []byte(sample)))
	image := disk.Bytes()
	require.Zero(t, len(image)%512)
	require.Equal(t, "initdata", string(image[:8]))
	size := binary.LittleEndian.Uint64(image[8:])
	r, err := gzip.NewReader(bytes.NewReader(image[16 : 16+size]))
	require.NoError(t, err)
	var text bytes.Buffer
	_, err = text.ReadFrom(r)
	require.NoError(t, err)
	require.Equal(t, sample, text.String())

	raw, err := ReadDisk(bytes.NewReader(append(image, make([]byte, 4096)...)))
	require.NoError(t, err)
	require.Equal(t, sample, string(raw))

	huge := bytes.Clone(image)
	binary.LittleEndian.PutUint64(huge[8:], 1<<63)
	short := bytes.Clone(image)
	binary.LittleEndian.PutUint64(short[8:], uint64(len(image)))
	magic := bytes.Clone(image)
	magic[0] = 'I'
	for name, tc := range map[string]struct {
		image []byte
		says  string
	}{
		"empty":           {nil, "short"},
		"another magic":   {magic, "begin with"},
		"too long":        {huge, "limit"},
		"shorter than it": {short, "shorter than it says"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := ReadDisk(bytes.NewReader(tc.image))
			require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
			require.ErrorContains(t, err, tc.says)
		})
	}
	require.ErrorIs(t, WriteDisk(&disk, make([]byte, MaxRaw+1)), errdefs.ErrInvalidArgument)
}

func zip(t testing.TB, data []byte) []byte {
	t.Helper()
	var out bytes.Buffer
	w := gzip.NewWriter(&out)
	_, err := w.Write(data)
	require.NoError(t, err)
	require.NoError(t, w.Close())
	return out.Bytes()
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(sample))
	f.Add([]byte("version = \"0.1.0\"\nalgorithm = \"sha-512\"\ndata.x = \"y\""))
	f.Fuzz(func(t *testing.T, raw []byte) {
		d, err := Parse(raw)
		if err != nil {
			require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
			return
		}
		require.LessOrEqual(t, len(d.Data), MaxEntries)
		require.NotEmpty(t, d.Digest())
	})
}

func FuzzDecodeAnnotation(f *testing.F) {
	value, err := EncodeAnnotation([]byte(sample))
	require.NoError(f, err)
	f.Add(value)
	f.Fuzz(func(t *testing.T, value string) {
		raw, err := DecodeAnnotation(value)
		if err != nil {
			require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
		}
		require.LessOrEqual(t, len(raw), MaxRaw)
	})
}

func FuzzReadDisk(f *testing.F) {
	var disk bytes.Buffer
	require.NoError(f, WriteDisk(&disk, []byte(sample)))
	f.Add(disk.Bytes())
	f.Add(disk.Bytes()[:20])
	f.Fuzz(func(t *testing.T, image []byte) {
		raw, err := ReadDisk(bytes.NewReader(image))
		if err != nil {
			require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
		}
		require.LessOrEqual(t, len(raw), MaxRaw)
	})
}
