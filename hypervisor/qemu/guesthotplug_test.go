// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cloister-project/cloister/hypervisor/vmtest"
)

// Without booting: QEMU's side of more disks than one target each.
func TestManyDisks(t *testing.T) {
	d := testDriver(t)
	dir, ctx := t.TempDir(), context.Background()
	v := startGuest(t, d, guestDocument(t, d, "idle"))
	start := time.Now()
	for i := range 300 {
		require.NoError(t, v.AddDisk(ctx, vmtest.Disk(t, dir, i*2)))
	}
	t.Logf("300 disks: added in %v", time.Since(start))
	start = time.Now()
	for i := range 300 {
		require.NoError(t, v.RemoveDisk(ctx, fmt.Sprintf("layer-%d", i*2)))
	}
	t.Logf("300 disks: removed in %v", time.Since(start))
}

// A writable image is one disk's alone.
func TestWritableDiskIsLocked(t *testing.T) {
	d := testDriver(t)
	ctx := context.Background()
	disk := vmtest.Disk(t, t.TempDir(), 1)
	require.False(t, disk.ReadOnly)
	v := startGuest(t, d, guestDocument(t, d, "idle"))
	require.NoError(t, v.AddDisk(ctx, disk))
	disk.ID, disk.Serial = "other", "other"
	require.ErrorContains(t, v.AddDisk(ctx, disk), "lock")
}
