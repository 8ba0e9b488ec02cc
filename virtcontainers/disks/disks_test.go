// SPDX-License-Identifier: Apache-2.0

package disks

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"

	agentv1 "github.com/cloister-project/cloister/agent-protocol/v1"
	"github.com/cloister-project/cloister/agent-protocol/wire"
	"github.com/cloister-project/cloister/hypervisor"
	"github.com/cloister-project/cloister/virtcontainers/rootfs"
)

// fakeVM counts the disks plugged in.
type fakeVM struct {
	mu      sync.Mutex
	plugged map[string]string
	adds    int
	fail    error
	// failPath is an image that cannot be plugged in.
	failPath string
}

func (f *fakeVM) AddDisk(_ context.Context, d hypervisor.Disk) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.adds++
	if f.fail != nil {
		return f.fail
	}
	if f.failPath != "" && d.Path == f.failPath {
		return errors.New("no room for it")
	}
	if _, ok := f.plugged[d.ID]; ok {
		return fmt.Errorf("disk %s is there already", d.ID)
	}
	if f.plugged == nil {
		f.plugged = map[string]string{}
	}
	f.plugged[d.ID] = d.Path
	return nil
}

func (f *fakeVM) RemoveDisk(_ context.Context, id string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if _, ok := f.plugged[id]; !ok {
		return fmt.Errorf("no disk %s", id)
	}
	delete(f.plugged, id)
	return nil
}

func TestDisksAreSharedAndCounted(t *testing.T) {
	var (
		ctx = context.Background()
		vm  fakeVM
		d   = New(&vm, time.Minute)
	)
	one, err := d.plug(ctx, "k", "/a")
	require.NoError(t, err)
	two, err := d.plug(ctx, "k", "/a")
	require.NoError(t, err)
	require.Equal(t, one, two)
	require.Equal(t, 1, vm.adds)
	d.unplug(ctx, "k")
	require.Len(t, vm.plugged, 1)
	d.unplug(ctx, "k")
	require.Empty(t, vm.plugged)
	d.unplug(ctx, "k")

	three, err := d.plug(ctx, "k", "/a")
	require.NoError(t, err)
	require.NotEqual(t, one, three, "a serial number is not used twice: the guest may still know the old disk")
}

func TestDisksFailedPlugCanBeTriedAgain(t *testing.T) {
	var (
		ctx = context.Background()
		vm  = fakeVM{fail: errors.New("no room")}
		d   = New(&vm, time.Minute)
	)
	_, err := d.plug(ctx, "k", "/a")
	require.ErrorContains(t, err, "no room")
	vm.fail = nil
	_, err = d.plug(ctx, "k", "/a")
	require.NoError(t, err)
	require.Len(t, vm.plugged, 1)
}

func TestDisksConcurrentUsers(t *testing.T) {
	var (
		ctx = context.Background()
		vm  fakeVM
		d   = New(&vm, time.Minute)
		all sync.WaitGroup
	)
	for i := range 50 {
		all.Go(func() {
			key := fmt.Sprint(i % 5)
			if _, err := d.plug(ctx, key, key); err != nil {
				t.Error(err)
				return
			}
			d.unplug(ctx, key)
		})
	}
	all.Wait()
	require.Empty(t, vm.plugged)
	require.Empty(t, d.byKey)
}

// undoList takes steps as a container does.
type undoList []func(context.Context)

func (u *undoList) add(step func(context.Context)) { *u = append(*u, step) }

func TestAttach(t *testing.T) {
	for _, tc := range []struct {
		name         string
		allots       int64
		limit, wants uint64
	}{
		{"no limit", 0, 0, 0}, {"the node's", 0, 5, 5}, {"the snapshotter's", 3, 0, 3},
		{"the smaller one", 3, 5, 3}, {"the smaller one again", 7, 5, 5}, {"nonsense", -1, 5, 5},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var (
				vm   fakeVM
				undo undoList
			)
			root := &rootfs.Rootfs{WritableBytes: tc.allots, Layers: []rootfs.Layer{
				{Key: "k", Path: "/a", Filesystem: "erofs", Extra: []string{"/b"}}, {Key: "l", Path: "/c", Filesystem: "erofs"},
			}}
			got, err := New(&vm, time.Minute).Attach(t.Context(), root, tc.limit, undo.add)
			require.NoError(t, err)
			require.Equal(t, tc.wants, got.GetWritableBytes())
			require.Len(t, got.GetLayers(), 2)
			require.Equal(t, &agentv1.Layer{Filesystem: "erofs", Serial: "layer1", ExtraSerials: []string{"layer2"}}, got.GetLayers()[0])
			require.Len(t, vm.plugged, 3)
			for _, step := range undo {
				step(t.Context())
			}
			require.Empty(t, vm.plugged)
		})
	}
	_, err := New(&fakeVM{}, time.Minute).Attach(t.Context(), &rootfs.Rootfs{Layers: make([]rootfs.Layer, wire.MaxLayers+1)}, 0, nil)
	require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
}

// What was plugged in before a fault is given back by the steps that were left.
func TestAttachThatFailsHalfWay(t *testing.T) {
	var (
		vm   = fakeVM{failPath: "/b"}
		undo undoList
	)
	root := &rootfs.Rootfs{Layers: []rootfs.Layer{{Key: "k", Path: "/a"}, {Key: "l", Path: "/b"}}}
	_, err := New(&vm, time.Minute).Attach(t.Context(), root, 0, undo.add)
	require.ErrorContains(t, err, "plug in /b: no room for it")
	require.Len(t, undo, 1)
	undo[0](t.Context())
	require.Empty(t, vm.plugged)
}
