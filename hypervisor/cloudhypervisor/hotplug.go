// SPDX-License-Identifier: Apache-2.0

package cloudhypervisor

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"

	"github.com/cloister-project/cloister/hypervisor"
	"github.com/cloister-project/cloister/hypervisor/hostcheck"
)

// plugTimeout bounds a request that changes the VM's devices.
const plugTimeout = 10 * time.Second

// plug sends a request that changes the VM. These take milliseconds, and one that is given up half-way leaves nobody knowing
// what the VM has: so it is not begun after the end of ctx, but then waited for. done is false if the VMM did not do it for
// certain.
func (v *vm) plug(ctx context.Context, request hypervisor.Request) (done bool, err error) {
	if err := context.Cause(ctx); err != nil {
		return false, err
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), plugTimeout)
	defer cancel()
	err = v.send(ctx, request)
	return !answered(err), err
}

// AddDisk implements hypervisor.VM.
func (v *vm) AddDisk(ctx context.Context, d hypervisor.Disk) (err error) {
	if err := d.Validate(); err != nil {
		return err
	}
	if _, err := hostcheck.Image(d.Path); err != nil {
		return fmt.Errorf("add disk %s: %w", d.ID, err)
	}
	i, err := openImage(d.Path)
	if err != nil {
		return fmt.Errorf("add disk %s: %w", d.ID, err)
	}
	e, err := v.disks.Reserve(d)
	if err != nil {
		i.close()
		return fmt.Errorf("add disk: %w", err)
	}
	done, err := v.addDisk(ctx, d, e.Place, i)
	if done {
		// With an outcome that is not known, the disk stays in the table for RemoveDisk.
		v.disks.Keep(e)
	} else {
		v.forget(d.ID)
		v.disks.Release(e)
	}
	if err != nil {
		return fmt.Errorf("add disk %s (%s): %w", d.ID, d.Path, err)
	}
	return nil
}

// addDisk takes over the image. done is false if the VM does not have the disk for certain.
func (v *vm) addDisk(ctx context.Context, d hypervisor.Disk, place int, i *image) (done bool, err error) {
	if !v.keep(d.ID, i) {
		i.close()
		return false, v.EndedError()
	}
	path := d.Path
	if v.mounts != nil {
		if err := v.mounts.attach(d, i); err != nil {
			return false, fmt.Errorf("show it to the VMM: %w", err)
		}
		path = v.mounts.path(d)
		defer func() {
			if !done {
				err = errors.Join(err, v.mounts.detach(d))
			}
		}()
	}
	r, err := request("vm.add-disk", newDisk(d, place, path))
	if err != nil {
		return false, err
	}
	return v.plug(ctx, r)
}

// keep remembers a disk's image; false if the VM has ended.
func (v *vm) keep(id string, i *image) bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.images == nil {
		return false
	}
	v.images[id] = i
	return true
}

func (v *vm) forget(id string) {
	v.mu.Lock()
	i := v.images[id]
	delete(v.images, id)
	v.mu.Unlock()
	if i != nil {
		i.close()
	}
}

// Grow implements hypervisor.VM: there is no room in any document.
func (v *vm) Grow(_ context.Context, memoryBytes uint64) error { return v.doc.CheckGrowth(memoryBytes) }

// RemoveDisk implements hypervisor.VM. After an error it can be repeated.
func (v *vm) RemoveDisk(ctx context.Context, id string) error {
	e, err := v.disks.Take(id)
	if err != nil {
		return fmt.Errorf("remove disk: %w", err)
	}
	if err := v.unplug(ctx, id); err != nil {
		v.disks.Keep(e)
		return fmt.Errorf("remove disk %s: %w", id, err)
	}
	if v.mounts != nil && v.isHotPlugged(e.Disk) {
		if err := v.mounts.detach(e.Disk); err != nil {
			// The VM has ended, or the mount goes with it.
			log.G(ctx).WithField("sandbox", v.doc.ID).WithError(err).Warn("hide a disk that was removed from the VMM")
		}
	}
	v.forget(id)
	v.disks.Release(e)
	return nil
}

// isHotPlugged reports whether a disk was hot-plugged; the others are at their own paths.
func (v *vm) isHotPlugged(d hypervisor.Disk) bool {
	for _, b := range v.doc.Disks {
		if b == d {
			return false
		}
	}
	return true
}

// unplug has the guest let go of a disk, and waits until the VMM has closed its image. There is no event for that, and the VM's
// information leaves out a device from the moment on that its removal is asked for.
func (v *vm) unplug(ctx context.Context, id string) error {
	v.mu.Lock()
	i := v.images[id]
	shared := false
	for other, o := range v.images {
		shared = shared || i != nil && other != id && o.same(i)
	}
	v.mu.Unlock()
	if i == nil {
		return v.EndedError()
	}
	closed, err := i.watch()
	if err != nil {
		return err
	}
	defer closed.close()
	if i.held == 0 {
		if i.held, err = i.openIn(v.PID()); err != nil {
			return v.orEnded(err)
		}
	}
	r, err := request("vm.remove-device", removeDevice{ID: diskID(id)})
	if err != nil {
		return err
	}
	// One that is not found was asked for before.
	if _, err := v.plug(ctx, r); err != nil && !errors.Is(err, errdefs.ErrNotFound) {
		return err
	}
	for {
		n, err := i.openIn(v.PID())
		if err != nil {
			return v.orEnded(err)
		}
		if n == 0 || shared && n < i.held {
			return nil
		}
		select {
		case <-closed.events:
		case <-v.Done():
			return v.EndedError()
		case <-ctx.Done():
			return fmt.Errorf("wait for the guest to let go of it: %w", context.Cause(ctx))
		}
	}
}

// orEnded is the reason of the VM's end, if that is why the process could not be looked at.
func (v *vm) orEnded(err error) error {
	select {
	case <-v.Proc.Done():
		<-v.Done()
		return v.EndedError()
	default:
		return err
	}
}

// AddSharedDirectory implements hypervisor.VM.
func (v *vm) AddSharedDirectory(ctx context.Context, s hypervisor.SharedDirectory) error {
	if err := s.Validate(); err != nil {
		return err
	}
	if _, err := v.shares.Reserve(s); err != nil {
		return fmt.Errorf("add shared directory: %w", err)
	}
	r, err := request("vm.add-fs", newDirectory(s))
	done := false
	if err == nil {
		done, err = v.plug(ctx, r)
	}
	if !done {
		// With an outcome that is not known, the place stays taken.
		v.shares.Release(s)
	}
	if err != nil {
		return fmt.Errorf("add shared directory %s, served at %s: %w", s.ID, s.Socket, err)
	}
	return nil
}
