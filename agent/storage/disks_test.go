// SPDX-License-Identifier: Apache-2.0

package storage

import (
	"context"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
)

func serialPage(serial string) []byte {
	return append([]byte{0, 0x80, 0, byte(len(serial))}, serial...)
}

func TestSerialPage(t *testing.T) {
	for _, tc := range []struct {
		page []byte
		want string
		ok   bool
	}{
		{serialPage("layer-1"), "layer-1", true},
		{serialPage("  layer-1 \x00"), "layer-1", true},
		{append(serialPage("abc"), 0, 0, 0), "abc", true},
		{serialPage(""), "", true},
		{nil, "", false},
		{[]byte{0, 0x83, 0, 1, 'x'}, "", false},
		{[]byte{0, 0x80, 1, 0, 'x'}, "", false},
	} {
		got, err := parseSerialPage(tc.page)
		require.Equal(t, tc.ok, err == nil, "%q", tc.page)
		require.Equal(t, tc.want, got)
	}
}

// sysTree makes a sysfs of disks. The devices are /dev/null and /dev/zero, since their numbers must be right.
func sysTree(t *testing.T) (block, dev string) {
	t.Helper()
	block, dev = t.TempDir(), "/dev"
	for name, files := range map[string]map[string]string{
		"null": {"dev": "1:3\n", "device/vpd_pg80": string(serialPage("scsi-1"))},
		"zero": {"dev": "1:5\n", "serial": "virtio-1"},
		"full": {"dev": "9:9\n", "serial": "wrong-number"},
		"none": {"dev": "9:9\n"},
	} {
		for file, content := range files {
			path := filepath.Join(block, name, file)
			require.NoError(t, os.MkdirAll(filepath.Dir(path), 0o755))
			require.NoError(t, os.WriteFile(path, []byte(content), 0o644))
		}
	}
	return block, dev
}

func TestFindDisk(t *testing.T) {
	block, dev := sysTree(t)
	disks, err := newSysfsDisks(block, dev)
	require.NoError(t, err)
	defer disks.close()
	for serial, want := range map[string]string{"scsi-1": "/dev/null", "virtio-1": "/dev/zero"} {
		f, err := disks.find(t.Context(), serial)
		require.NoError(t, err)
		require.Equal(t, want, f.Name())
		require.NoError(t, f.Close())
	}
	for _, serial := range []string{"missing", "wrong-number"} {
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
		_, err = disks.find(ctx, serial)
		cancel()
		require.ErrorIs(t, err, context.DeadlineExceeded)
		require.ErrorContains(t, err, serial)
	}
	// A wait that ended does not spoil the next one.
	f, err := disks.find(t.Context(), "scsi-1")
	require.NoError(t, err)
	require.NoError(t, f.Close())

	// The serial moved to another disk after the last look.
	require.NoError(t, os.WriteFile(filepath.Join(block, "null/device/vpd_pg80"), serialPage("other"), 0o644))
	require.NoError(t, os.WriteFile(filepath.Join(block, "zero/serial"), []byte("scsi-1"), 0o644))
	f, err = disks.find(t.Context(), "scsi-1")
	require.NoError(t, err)
	require.Equal(t, "/dev/zero", f.Name())
	require.NoError(t, f.Close())

	// Two with one serial: neither is taken.
	require.NoError(t, os.WriteFile(filepath.Join(block, "full/serial"), []byte("scsi-1"), 0o644))
	disks.names = nil
	_, err = disks.find(t.Context(), "scsi-1")
	require.ErrorIs(t, err, errdefs.ErrFailedPrecondition)
}

func FuzzSerialPage(f *testing.F) {
	f.Add(serialPage("layer-1"))
	f.Add([]byte{0, 0x80, 0xff, 0xff})
	f.Fuzz(func(t *testing.T, page []byte) { _, _ = parseSerialPage(page) })
}
