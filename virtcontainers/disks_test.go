// SPDX-License-Identifier: Apache-2.0

package virtcontainers

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/cloister-project/cloister/hypervisor"
)

// fakeVM counts the disks plugged in.
type fakeVM struct {
	hypervisor.VM

	mu      sync.Mutex
	plugged map[string]string
	adds    int
	fail    error
}

func (f *fakeVM) AddDisk(_ context.Context, d hypervisor.Disk) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.adds++
	if f.fail != nil {
		return f.fail
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
		d   disks
	)
	one, err := d.attach(ctx, &vm, "k", "/a")
	require.NoError(t, err)
	two, err := d.attach(ctx, &vm, "k", "/a")
	require.NoError(t, err)
	require.Equal(t, one, two)
	require.Equal(t, 1, vm.adds)
	d.detach(ctx, &vm, "k")
	require.Len(t, vm.plugged, 1)
	d.detach(ctx, &vm, "k")
	require.Empty(t, vm.plugged)
	d.detach(ctx, &vm, "k")

	three, err := d.attach(ctx, &vm, "k", "/a")
	require.NoError(t, err)
	require.NotEqual(t, one, three, "a serial number is not used twice: the guest may still know the old disk")
}

func TestDisksFailedPlugCanBeTriedAgain(t *testing.T) {
	var (
		ctx = context.Background()
		vm  = fakeVM{fail: errors.New("no room")}
		d   disks
	)
	_, err := d.attach(ctx, &vm, "k", "/a")
	require.ErrorContains(t, err, "no room")
	vm.fail = nil
	_, err = d.attach(ctx, &vm, "k", "/a")
	require.NoError(t, err)
	require.Len(t, vm.plugged, 1)
}

func TestDisksConcurrentUsers(t *testing.T) {
	var (
		ctx = context.Background()
		vm  fakeVM
		d   disks
		all sync.WaitGroup
	)
	for i := range 50 {
		all.Go(func() {
			key := fmt.Sprint(i % 5)
			if _, err := d.attach(ctx, &vm, key, key); err != nil {
				t.Error(err)
				return
			}
			d.detach(ctx, &vm, key)
		})
	}
	all.Wait()
	require.Empty(t, vm.plugged)
	require.Empty(t, d.byKey)
}
