// SPDX-License-Identifier: Apache-2.0

package report

import (
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/go-configfs-tsm/configfs/configfsi"
	"github.com/stretchr/testify/require"

	"github.com/cloister-project/cloister/tee/abi"
)

// fakeTSM is configfs-tsm of a kernel with one entry at a time.
type fakeTSM struct {
	provider, floor string
	// answer makes the outblob of a request.
	answer func(inblob, privlevel []byte) ([]byte, error)
	wrote  map[string][]byte
	open   bool
}

func (f *fakeTSM) MkdirTemp(dir, _ string) (string, error) {
	if dir != "/sys/kernel/config/tsm/report" || f.open {
		return "", os.ErrInvalid
	}
	f.open, f.wrote = true, map[string][]byte{}
	return dir + "/cloister1", nil
}

func (f *fakeTSM) ReadFile(name string) ([]byte, error) {
	switch filepath.Base(name) {
	case "provider":
		return []byte(f.provider), nil
	case "privlevel_floor":
		return []byte(f.floor), nil
	case "outblob":
		return f.answer(f.wrote["inblob"], f.wrote["privlevel"])
	}
	return nil, os.ErrNotExist
}

func (f *fakeTSM) WriteFile(name string, b []byte) error {
	f.wrote[filepath.Base(name)] = b
	return nil
}
func (f *fakeTSM) RemoveAll(string) error                { f.open = false; return nil }
func (f *fakeTSM) ReadDir(string) ([]os.DirEntry, error) { return nil, os.ErrInvalid }

var _ configfsi.Client = (*fakeTSM)(nil)

func snpReport(nonce []byte) []byte {
	raw := make([]byte, snpSize)
	binary.LittleEndian.PutUint32(raw, 3)
	copy(raw[0x50:], nonce)
	for i := range 32 {
		raw[0xc0+i] = byte(i + 1)
	}
	return raw
}

func tdReport(nonce []byte) []byte {
	raw := make([]byte, tdxSize)
	raw[0] = 0x81
	copy(raw[128:], nonce)
	for i := range 48 {
		raw[576+i] = byte(i + 1)
	}
	return raw
}

func TestSNP(t *testing.T) {
	tsm := &fakeTSM{provider: "sev_guest\n", floor: "0\n", answer: func(in, level []byte) ([]byte, error) {
		require.Len(t, in, NonceSize)
		require.Empty(t, level)
		return snpReport(in), nil
	}}
	launch, err := Hardware{TSM: tsm}.Read(abi.SNP)
	require.NoError(t, err)
	require.Equal(t, abi.SNP, launch.Platform)
	require.False(t, launch.Debug)
	require.Equal(t, snpReport(nil)[0xc0:0xe0], launch.Bound)
	require.False(t, tsm.open, "the entry is taken away")

	tsm.floor = "2\n"
	tsm.answer = func(in, level []byte) ([]byte, error) {
		require.Equal(t, "2", string(level))
		raw := snpReport(in)
		raw[8+2] = 1 << 3 // bit 19 of the policy
		return raw, nil
	}
	launch, err = Hardware{TSM: tsm}.Read(abi.SNP)
	require.NoError(t, err)
	require.True(t, launch.Debug)
}

func TestSNPRefuses(t *testing.T) {
	for name, tc := range map[string]struct {
		provider string
		answer   func(in, _ []byte) ([]byte, error)
		says     string
	}{
		"TDX":          {"tdx_guest\n", nil, `"tdx_guest"`},
		"an old one":   {"sev_guest\n", func([]byte, []byte) ([]byte, error) { return snpReport(make([]byte, NonceSize)), nil }, "echo"},
		"too short":    {"sev_guest\n", func(in, _ []byte) ([]byte, error) { return snpReport(in)[:snpSize-1], nil }, "bytes"},
		"with more":    {"sev_guest\n", func(in, _ []byte) ([]byte, error) { return append(snpReport(in), 0), nil }, "bytes"},
		"nothing":      {"sev_guest\n", func([]byte, []byte) ([]byte, error) { return nil, nil }, "0 bytes"},
		"no answer":    {"sev_guest\n", func([]byte, []byte) ([]byte, error) { return nil, errors.New("throttled") }, "throttled"},
		"version 1":    {"sev_guest\n", func(in, _ []byte) ([]byte, error) { return patch(snpReport(in), 0, 1), nil }, "version 1"},
		"version 6":    {"sev_guest\n", func(in, _ []byte) ([]byte, error) { return patch(snpReport(in), 0, 6), nil }, "version 6"},
		"high version": {"sev_guest\n", func(in, _ []byte) ([]byte, error) { return patch(snpReport(in), 3, 1), nil }, "version"},
	} {
		t.Run(name, func(t *testing.T) {
			tsm := &fakeTSM{provider: tc.provider, answer: tc.answer}
			_, err := Hardware{TSM: tsm}.Read(abi.SNP)
			require.ErrorIs(t, err, errdefs.ErrFailedPrecondition)
			require.ErrorContains(t, err, tc.says)
			require.False(t, tsm.open, "the entry is taken away")
		})
	}
}

func patch(raw []byte, at int, value byte) []byte {
	raw[at] = value
	return raw
}

func TestTDX(t *testing.T) {
	for name, tc := range map[string]struct {
		change func(raw []byte) []byte
		says   string
		debug  bool
	}{
		"right":        {func(raw []byte) []byte { return raw }, "", false},
		"version 1":    {func(raw []byte) []byte { return patch(raw, 2, 1) }, "", false},
		"debug":        {func(raw []byte) []byte { return patch(raw, 512, 1) }, "", true},
		"version 2":    {func(raw []byte) []byte { return patch(raw, 2, 2) }, "type", false},
		"SGX":          {func(raw []byte) []byte { return patch(raw, 0, 0) }, "type", false},
		"subtype":      {func(raw []byte) []byte { return patch(raw, 1, 1) }, "type", false},
		"an old one":   {func(raw []byte) []byte { return patch(raw, 128, raw[128]+1) }, "echo", false},
		"too short":    {func(raw []byte) []byte { return raw[:tdxSize-1] }, "bytes", false},
		"with more":    {func(raw []byte) []byte { return append(raw, 0) }, "bytes", false},
		"nothing":      {func([]byte) []byte { return nil }, "0 bytes", false},
		"another size": {func([]byte) []byte { return make([]byte, snpSize) }, "bytes", false},
	} {
		t.Run(name, func(t *testing.T) {
			launch, err := Hardware{TDReport: func(n [NonceSize]byte) ([]byte, error) { return tc.change(tdReport(n[:])), nil }}.Read(abi.TDX)
			if tc.says != "" {
				require.ErrorIs(t, err, errdefs.ErrFailedPrecondition)
				require.ErrorContains(t, err, tc.says)
				return
			}
			require.NoError(t, err)
			require.Equal(t, &Launch{Platform: abi.TDX, Bound: tdReport(nil)[576:624], Debug: tc.debug}, launch)
		})
	}
}

func TestSE(t *testing.T) {
	root := t.TempDir()
	_, err := Hardware{Root: root}.Read(abi.SE)
	require.ErrorIs(t, err, errdefs.ErrFailedPrecondition)
	file := filepath.Join(root, protVirtGuest)
	require.NoError(t, os.MkdirAll(filepath.Dir(file), 0o755))
	for text, says := range map[string]string{"1\n": "", "0\n": `"0"`, "": `""`, "1 1": "not 1"} {
		require.NoError(t, os.WriteFile(file, []byte(text), 0o644))
		launch, err := Hardware{Root: root}.Read(abi.SE)
		if says == "" {
			require.NoError(t, err)
			require.Equal(t, &Launch{Platform: abi.SE}, launch)
			continue
		}
		require.ErrorContains(t, err, says)
	}
}

// TestNotHere: where this test runs nothing may pass for a platform by itself.
func TestNotHere(t *testing.T) {
	for _, name := range []abi.Platform{abi.SNP, abi.TDX, abi.SE} {
		_, err := Hardware{Root: t.TempDir()}.Read(name)
		if name == abi.SNP && err == nil {
			t.Skip("this is an SEV-SNP guest")
		}
		require.ErrorIs(t, err, errdefs.ErrFailedPrecondition)
	}
	for _, name := range []abi.Platform{"", "sample", "none", "SNP", abi.Platform(strings.Repeat("x", 100))} {
		_, err := Hardware{}.Read(name)
		require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
	}
	require.EqualValues(t, 0xc4405401, getReport0)
}

func FuzzReports(f *testing.F) {
	f.Add(snpReport(make([]byte, NonceSize)))
	f.Add(tdReport(make([]byte, NonceSize)))
	f.Add([]byte{0x81})
	f.Fuzz(func(t *testing.T, raw []byte) {
		if launch, err := parseSNP(raw, [NonceSize]byte{}); err == nil {
			require.Len(t, launch.Bound, abi.SNPHostDataSize)
			require.Len(t, raw, snpSize)
		}
		if launch, err := parseTDX(raw, [NonceSize]byte{}); err == nil {
			require.Len(t, launch.Bound, abi.TDXDigestSize)
			require.Len(t, raw, tdxSize)
		}
	})
}
