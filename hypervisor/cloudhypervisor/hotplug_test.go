// SPDX-License-Identifier: Apache-2.0

package cloudhypervisor

import (
	"context"
	"os"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"

	"github.com/cloister-project/cloister/hypervisor"
)

func TestAddDiskFaults(t *testing.T) {
	for mode, stays := range map[string]bool{
		"fails:vm.add-disk": false, "cut:vm.add-disk": true, "half:vm.add-disk": true, "garbage:vm.add-disk": true,
	} {
		t.Run(mode, func(t *testing.T) {
			t.Parallel()
			v := start(t, mode, func(d *hypervisor.Document, _ *hypervisor.Resources) { d.Sandboxed = true })
			require.NoError(t, v.Boot(t.Context()))
			d := testDisk(t, "a", true)
			require.Error(t, v.AddDisk(t.Context(), d))
			if !stays {
				require.Empty(t, v.images)
				require.ErrorIs(t, v.RemoveDisk(t.Context(), "a"), errdefs.ErrNotFound)
				require.ErrorIs(t, v.AddDisk(t.Context(), d), errdefs.ErrInternal, "it is asked for again, at the same place")
				return
			}
			require.ErrorIs(t, v.AddDisk(t.Context(), d), errdefs.ErrAlreadyExists)
			require.NoError(t, v.RemoveDisk(t.Context(), "a"))
		})
	}
}

func TestAddDiskGivenUp(t *testing.T) {
	v := start(t, "none", nil)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	require.ErrorIs(t, v.AddDisk(ctx, testDisk(t, "a", true)), context.Canceled)
	require.ErrorIs(t, v.RemoveDisk(t.Context(), "a"), errdefs.ErrNotFound)
	require.ErrorIs(t, v.AddDisk(t.Context(), hypervisor.Disk{ID: "a", Serial: "a", Path: "/nonexistent"}), os.ErrNotExist)
}

func TestRemoveDiskWaitsForTheGuest(t *testing.T) {
	v := start(t, "holds", func(d *hypervisor.Document, _ *hypervisor.Resources) { d.Sandboxed = true })
	require.NoError(t, v.Boot(t.Context()))
	require.NoError(t, v.AddDisk(t.Context(), testDisk(t, "a", true)))
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	err := v.RemoveDisk(ctx, "a")
	require.ErrorIs(t, err, context.DeadlineExceeded)
	require.ErrorContains(t, err, "wait for the guest to let go of it")
	require.NoError(t, v.RemoveDisk(t.Context(), "a"), "the VMM does not find it any more, and closes it")
}

func TestRemoveDiskOfTheSameImage(t *testing.T) {
	v := start(t, "none", nil)
	require.NoError(t, v.Boot(t.Context()))
	a := testDisk(t, "a", true)
	b := a
	b.ID, b.Serial = "b", "serial-b"
	require.NoError(t, v.AddDisk(t.Context(), a))
	require.NoError(t, v.AddDisk(t.Context(), b))
	require.NoError(t, v.RemoveDisk(t.Context(), "a"))
	require.NoError(t, v.RemoveDisk(t.Context(), "b"))
}

func TestRemoveDiskWhileTheVMEnds(t *testing.T) {
	v := start(t, "holds", nil)
	require.NoError(t, v.Boot(t.Context()))
	require.NoError(t, v.AddDisk(t.Context(), testDisk(t, "a", true)))
	failed := make(chan error, 1)
	go func() { failed <- v.RemoveDisk(context.Background(), "a") }()
	waitLog(t, v, "request vm.remove-device")
	v.Kill()
	if err := <-failed; err != nil { // a VMM that is gone has closed the image, too
		require.ErrorIs(t, err, errdefs.ErrFailedPrecondition)
	}
}

func TestAddSharedDirectory(t *testing.T) {
	v := start(t, "none", func(d *hypervisor.Document, _ *hypervisor.Resources) {
		d.Memory.Shared, d.SharedDirectories, d.Sandboxed = true, 1, true
	})
	require.NoError(t, v.Boot(t.Context()))
	nobody := hypervisor.SharedDirectory{ID: "x", Tag: "x", Socket: "/nonexistent/socket"}
	require.ErrorContains(t, v.AddSharedDirectory(t.Context(), nobody), "/nonexistent/socket")
	somebody := nobody
	somebody.Socket = v.client.Socket
	require.NoError(t, v.AddSharedDirectory(t.Context(), somebody), "the place is free again")
	err := v.AddSharedDirectory(t.Context(), hypervisor.SharedDirectory{ID: "y", Tag: "y", Socket: "/y"})
	require.ErrorIs(t, err, errdefs.ErrResourceExhausted)
}
