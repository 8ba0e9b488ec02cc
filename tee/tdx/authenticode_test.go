// SPDX-License-Identifier: Apache-2.0

package tdx

import (
	"bytes"
	"encoding/binary"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
)

// Layout of testPE.
const (
	tPE      = 0x80
	tOpt     = tPE + coffSize
	tTable   = tOpt + optDirectoryBase + 16*directorySize
	tHeaders = 0x200
)

// testPE is a small PE32+ image: two sections in the "wrong" order in the table, bytes behind them, and signatures.
func testPE(signatures []byte) []byte {
	le := binary.LittleEndian
	b := make([]byte, tHeaders)
	copy(b, "MZ")
	le.PutUint32(b[dosPEOffset:], tPE)
	copy(b[tPE:], "PE\x00\x00")
	le.PutUint16(b[tPE+4:], machineAMD64)
	le.PutUint16(b[tPE+6:], 3)
	le.PutUint16(b[tPE+20:], optDirectoryBase+16*directorySize)
	le.PutUint16(b[tOpt:], magicPE32Plus)
	le.PutUint32(b[tOpt+optHeadersSize:], tHeaders)
	le.PutUint32(b[tOpt+optChecksum:], 0x11223344)
	le.PutUint32(b[tOpt+optDirectories:], 16)
	section := func(n int, at, size uint32) {
		le.PutUint32(b[tTable+n*sectionSize+16:], size)
		le.PutUint32(b[tTable+n*sectionSize+20:], at)
	}
	section(0, tHeaders+0x100, 0x180)
	section(1, tHeaders, 0x100)
	section(2, 0, 0) // nothing in the file
	b = append(b, bytes.Repeat([]byte{1}, 0x100)...)
	b = append(b, bytes.Repeat([]byte{2}, 0x180)...)
	b = append(b, "tail"...)
	if signatures != nil {
		le.PutUint32(b[tOpt+optDirectoryBase+certificates*directorySize:], uint32(len(b)))
		le.PutUint32(b[tOpt+optDirectoryBase+certificates*directorySize+4:], uint32(len(signatures)))
	}
	return append(b, signatures...)
}

func TestAuthenticode(t *testing.T) {
	plain := testPE(nil)
	cert := tOpt + optDirectoryBase + certificates*directorySize
	want := sum(plain[:tOpt+optChecksum], plain[tOpt+optChecksum+4:cert], plain[cert+directorySize:])
	got, err := Authenticode(plain)
	require.NoError(t, err)
	require.Equal(t, want, got)

	signed, err := Authenticode(testPE([]byte("signature")))
	require.NoError(t, err)
	require.Equal(t, want, signed, "signatures do not count")

	changed := testPE(nil)
	changed[tOpt+optChecksum]++
	got, err = Authenticode(changed)
	require.NoError(t, err)
	require.Equal(t, want, got, "the checksum does not count")
	for _, at := range []int{0x40, tHeaders - 1, tHeaders, tHeaders + 0x100, len(plain) - 1} {
		changed := testPE(nil)
		changed[at]++
		got, err = Authenticode(changed)
		require.NoError(t, err)
		require.NotEqual(t, want, got, "byte %#x counts", at)
	}
}

func TestAuthenticodeRefuses(t *testing.T) {
	le := binary.LittleEndian
	for name, change := range map[string]func(b []byte) []byte{
		"empty":                 func([]byte) []byte { return nil },
		"no MZ":                 func(b []byte) []byte { b[0] = 0; return b },
		"an ELF":                func([]byte) []byte { return append([]byte("\x7fELF"), make([]byte, 200)...) },
		"PE outside":            func(b []byte) []byte { le.PutUint32(b[dosPEOffset:], 0xfffffff0); return b },
		"PE in the DOS header":  func(b []byte) []byte { le.PutUint32(b[dosPEOffset:], 2); return b },
		"no PE":                 func(b []byte) []byte { b[tPE] = 0; return b },
		"another machine":       func(b []byte) []byte { b[tPE+4] = 0x4c; return b },
		"PE32":                  func(b []byte) []byte { b[tOpt+1] = 1; return b },
		"too many directories":  func(b []byte) []byte { b[tOpt+optDirectories] = 17; return b },
		"directories outside":   func(b []byte) []byte { le.PutUint16(b[tPE+20:], optDirectoryBase); return b },
		"headers outside":       func(b []byte) []byte { le.PutUint32(b[tOpt+optHeadersSize:], 0x10000); return b },
		"too many sections":     func(b []byte) []byte { le.PutUint16(b[tPE+6:], 0xffff); return b },
		"section outside":       func(b []byte) []byte { le.PutUint32(b[tTable+16:], 0x1000); return b },
		"overlapping sections":  func(b []byte) []byte { le.PutUint32(b[tTable+20:], tHeaders+0x80); return b },
		"gap":                   func(b []byte) []byte { le.PutUint32(b[tTable+sectionSize+16:], 0xf0); return b },
		"signatures in between": func([]byte) []byte { return append(testPE([]byte("signature")), 0) },
		"signatures too large": func(b []byte) []byte {
			at := tOpt + optDirectoryBase + certificates*directorySize
			le.PutUint32(b[at:], 0x10)
			le.PutUint32(b[at+4:], uint32(len(b))-0x10)
			return b
		},
	} {
		_, err := Authenticode(change(testPE(nil)))
		require.ErrorIs(t, err, errdefs.ErrInvalidArgument, name)
	}
}

func FuzzAuthenticode(f *testing.F) {
	f.Add([]byte("MZ"))
	f.Add(testPE(nil))
	f.Add(testPE([]byte("signature")))
	f.Add(testPE(nil)[:tHeaders])
	f.Fuzz(func(t *testing.T, b []byte) {
		before := sum(b)
		d, err := Authenticode(b)
		if sum(b) != before {
			t.Fatal("the input was written to")
		}
		if err != nil && (!errdefs.IsInvalidArgument(err) || d != Digest{}) {
			t.Fatalf("%v with %s", err, d)
		}
	})
}
