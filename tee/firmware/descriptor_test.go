// SPDX-License-Identifier: Apache-2.0

package firmware_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/cloister-project/cloister/tee/firmware"
)

// descriptor is one as distributions install them, with a change.
func descriptor(filename, old, new string) string {
	d := `{
	"description": "UEFI firmware", "interface-types": ["uefi"],
	"mapping": {"device": "memory", "filename": "` + filename + `"},
	"targets": [{"architecture": "i386", "machines": ["pc-q35-*"]}, {"architecture": "x86_64", "machines": ["pc-i440fx-*", "pc-q35-*"]}],
	"features": ["amd-sev", "amd-sev-es", "amd-sev-snp", "verbose-dynamic"], "tags": []
}`
	return strings.ReplaceAll(d, old, new)
}

func writeFile(t *testing.T, path, content string) string {
	t.Helper()
	require.NoError(t, os.MkdirAll(filepath.Dir(path), 0o700))
	require.NoError(t, os.WriteFile(path, []byte(content), 0o600))
	return path
}

func TestFindTakesTheFirstThatFits(t *testing.T) {
	etc, usr := t.TempDir(), t.TempDir()
	dirs := []string{filepath.Join(etc, "missing"), etc, usr}
	find := func(want string) {
		t.Helper()
		got, err := firmware.Find(dirs, firmware.FeatureSNP)
		require.NoError(t, err)
		require.Equal(t, want, got)
	}
	writeFile(t, filepath.Join(usr, "60-snp.json"), descriptor("/60", "", ""))
	writeFile(t, filepath.Join(usr, "70-snp.json"), descriptor("/70", "", ""))
	writeFile(t, filepath.Join(usr, "10-flash.json"), descriptor("/10", `"memory"`, `"flash"`))
	writeFile(t, filepath.Join(usr, "05-broken.json"), "{")
	writeFile(t, filepath.Join(usr, "01-snp.json~"), descriptor("/01", "", ""))
	require.NoError(t, os.Mkdir(filepath.Join(usr, "02-directory.json"), 0o700))
	find("/60")
	// Names count over all directories.
	writeFile(t, filepath.Join(etc, "65-snp.json"), descriptor("/65", "", ""))
	find("/60")
	// The administrator's file masks the distribution's; an empty one masks without fitting.
	writeFile(t, filepath.Join(etc, "60-snp.json"), descriptor("/60-etc", "", ""))
	find("/60-etc")
	writeFile(t, filepath.Join(etc, "60-snp.json"), "")
	find("/65")
}

func TestFindSaysWhyNothingFits(t *testing.T) {
	for _, tt := range []struct {
		name, want, content string
	}{
		{"feature", "no feature amd-sev-snp", descriptor("/f", `"amd-sev-snp", `, "")},
		{"feature's name as part of another", "no feature amd-sev-snp", descriptor("/f", "amd-sev-snp", "amd-sev-snp2")},
		{"device", `mapping.device is "flash"`, descriptor("/f", `"memory"`, `"flash"`)},
		{"relative path", "no absolute path", descriptor("f", "", "")},
		{"NUL in the path", "no absolute path", descriptor(`/f\u0000`, "", "")},
		{"architecture", "no target x86_64", descriptor("/f", "x86_64", "aarch64")},
		{"machine", "with a q35 machine", descriptor("/f", "pc-q35-*", "microvm")},
		{"no JSON", "no firmware descriptor", "features: [amd-sev-snp]"},
		{"another type", "no firmware descriptor", `{"features": "amd-sev-snp"}`},
		{"two values", "something follows", descriptor("/f", "", "") + "{}"},
		{"too large", "more than the 65536", strings.Repeat(" ", 70_000)},
		{"nothing", "no descriptors", ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			writeFile(t, filepath.Join(dir, "60.json"), tt.content)
			path, err := firmware.Find([]string{dir}, firmware.FeatureSNP)
			require.ErrorContains(t, err, tt.want)
			require.ErrorContains(t, err, dir)
			require.ErrorIs(t, err, errdefs.ErrNotFound)
			require.Empty(t, path)
		})
	}
}

func TestMachinePatterns(t *testing.T) {
	for pattern, want := range map[string]bool{
		"pc-q35-*": true, "pc-q35-9.2": true, "q35": true, "*": true, "pc-*": true, "pc-i440fx-*": false, "[": false, "": false,
	} {
		d, err := firmware.ParseDescriptor([]byte(descriptor("/f", `"pc-i440fx-*", "pc-q35-*"`, `"`+pattern+`"`)))
		require.NoError(t, err)
		_, ok := d.Fits(firmware.FeatureSNP)
		require.Equal(t, want, ok, "%q", pattern)
	}
}

func TestReadFile(t *testing.T) {
	dir := t.TempDir()
	path := writeFile(t, filepath.Join(dir, "f"), "abc")
	const sum = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad" // FIPS 180-2, appendix B.1
	content, digest, err := firmware.ReadFile(path, 3)
	require.NoError(t, err)
	require.Equal(t, "abc", string(content))
	require.Equal(t, sum, digest)
	digest, err = firmware.DigestFile(path, 3)
	require.NoError(t, err)
	require.Equal(t, sum, digest)

	_, _, err = firmware.ReadFile(path, 2)
	require.ErrorContains(t, err, "has 3 bytes, more than the 2")
	require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
	_, _, err = firmware.ReadFile(filepath.Join(dir, "missing"), 3)
	require.ErrorIs(t, err, os.ErrNotExist)
	_, _, err = firmware.ReadFile(dir, 1<<20)
	require.ErrorContains(t, err, "no regular file")
	fifo := filepath.Join(dir, "fifo")
	require.NoError(t, unix.Mkfifo(fifo, 0o600))
	_, _, err = firmware.ReadFile(fifo, 3)
	require.ErrorContains(t, err, "no regular file", "and the call does not wait for a writer")
}

func FuzzParseDescriptor(f *testing.F) {
	f.Add([]byte(descriptor("/f", "", "")))
	f.Add([]byte(descriptor("/f", "pc-q35-*", "[")))
	f.Add([]byte(`{"mapping": null, "targets": [{}]}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		d, err := firmware.ParseDescriptor(raw)
		if err != nil {
			require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
			return
		}
		if _, ok := d.Fits(firmware.FeatureTDX); ok {
			require.True(t, filepath.IsAbs(d.Mapping.Filename))
			require.NotContains(t, d.Mapping.Filename, "\x00")
		}
	})
}
