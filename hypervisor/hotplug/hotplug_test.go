// SPDX-License-Identifier: Apache-2.0

package hotplug

import (
	"fmt"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"

	"github.com/cloister-project/cloister/hypervisor"
)

func disk(i int) hypervisor.Disk {
	return hypervisor.Disk{ID: fmt.Sprint("d", i), Serial: fmt.Sprint("s", i)}
}

func TestDisks(t *testing.T) {
	table := NewDisks([]hypervisor.Disk{disk(0)}, 3)
	one, err := table.Reserve(disk(1))
	require.NoError(t, err)
	require.Equal(t, 1, one.Place)
	_, err = table.Take("d1")
	require.ErrorIs(t, err, errdefs.ErrUnavailable, "it is being added")
	table.Keep(one)
	two, err := table.Reserve(disk(2))
	require.NoError(t, err)

	for _, tc := range []struct {
		disk hypervisor.Disk
		want error
	}{
		{disk(2), errdefs.ErrAlreadyExists},
		{hypervisor.Disk{ID: "other", Serial: "s0"}, errdefs.ErrAlreadyExists},
		{disk(3), errdefs.ErrResourceExhausted},
	} {
		_, err := table.Reserve(tc.disk)
		require.ErrorIs(t, err, tc.want)
	}
	_, err = table.Take("d3")
	require.ErrorIs(t, err, errdefs.ErrNotFound)

	table.Release(two)
	zero, err := table.Take("d0")
	require.NoError(t, err)
	_, err = table.Take("d0")
	require.ErrorIs(t, err, errdefs.ErrUnavailable, "it is being removed")
	table.Release(zero)
	// A place that was just given back is not the next one.
	three, err := table.Reserve(disk(3))
	require.NoError(t, err)
	require.Equal(t, 0, three.Place)
	again, err := table.Reserve(disk(0))
	require.NoError(t, err)
	require.Equal(t, 2, again.Place)
}

func TestDirectories(t *testing.T) {
	dir := func(i int) hypervisor.SharedDirectory {
		return hypervisor.SharedDirectory{ID: fmt.Sprint("d", i), Tag: fmt.Sprint("t", i)}
	}
	table := NewDirectories(2)
	for i := range 2 {
		place, err := table.Reserve(dir(i))
		require.NoError(t, err)
		require.Equal(t, i, place)
	}
	_, err := table.Reserve(dir(1))
	require.ErrorIs(t, err, errdefs.ErrAlreadyExists)
	_, err = table.Reserve(hypervisor.SharedDirectory{ID: "other", Tag: "t0"})
	require.ErrorIs(t, err, errdefs.ErrAlreadyExists)
	_, err = table.Reserve(dir(2))
	require.ErrorIs(t, err, errdefs.ErrResourceExhausted)
	table.Release(dir(0))
	place, err := table.Reserve(dir(2))
	require.NoError(t, err)
	require.Equal(t, 0, place)
}
