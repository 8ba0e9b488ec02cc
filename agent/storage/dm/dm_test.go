// SPDX-License-Identifier: Apache-2.0

package dm

import (
	"bytes"
	"encoding/binary"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
)

// TestRequest holds the encoding against linux/dm-ioctl.h, field by field.
func TestRequest(t *testing.T) {
	order := binary.NativeEndian
	b, err := request("scratch", nil)
	require.NoError(t, err)
	require.Len(t, b, 312)
	require.Equal(t, []uint32{4, 0, 0, 312, 312, 0}, words(b[:24]))
	require.Equal(t, "scratch\x00", string(b[48:56]))

	b, err = request("scratch", &Target{Type: "crypt", Sectors: 1 << 33, Parameters: []byte("a b c")})
	require.NoError(t, err)
	require.Len(t, b, 312+48, "the text and its NUL, in whole words")
	require.Equal(t, []uint32{4, 0, 0, 360, 312, 1, 0, 1 << 15}, words(b[:32]))
	spec := b[312:]
	require.Zero(t, order.Uint64(spec))
	require.Equal(t, uint64(1<<33), order.Uint64(spec[8:]))
	require.Equal(t, []uint32{0, 48}, words(spec[16:24]))
	require.Equal(t, "crypt"+strings.Repeat("\x00", 11)+"a b c\x00\x00\x00", string(spec[24:]))
}

func words(b []byte) (all []uint32) {
	for ; len(b) >= 4; b = b[4:] {
		all = append(all, binary.NativeEndian.Uint32(b))
	}
	return all
}

func TestRequestRefuses(t *testing.T) {
	good := Target{Type: "crypt", Sectors: 8, Parameters: []byte("x")}
	for what, change := range map[string]func(name *string, t *Target){
		"no name":         func(name *string, _ *Target) { *name = "" },
		"long name":       func(name *string, _ *Target) { *name = strings.Repeat("n", 128) },
		"path":            func(name *string, _ *Target) { *name = "a/b" },
		"no type":         func(_ *string, t *Target) { t.Type = "" },
		"long type":       func(_ *string, t *Target) { t.Type = strings.Repeat("t", 16) },
		"no sectors":      func(_ *string, t *Target) { t.Sectors = 0 },
		"NUL":             func(_ *string, t *Target) { t.Parameters = []byte("SECRET\x00x") },
		"long parameters": func(_ *string, t *Target) { t.Parameters = bytes.Repeat([]byte("SECRET"), 1000) },
	} {
		name, target := "n", good
		change(&name, &target)
		_, err := request(name, &target)
		require.ErrorIs(t, err, errdefs.ErrInvalidArgument, what)
		require.NotContains(t, err.Error(), "SECRET", what)
		_, err = Create(name, target)
		require.ErrorIs(t, err, errdefs.ErrInvalidArgument, what)
	}
}
