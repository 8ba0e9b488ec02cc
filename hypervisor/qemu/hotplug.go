// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"

	"github.com/cloister-project/cloister/hypervisor"
)

// plugTimeout bounds a command that changes the VM's devices.
const plugTimeout = 10 * time.Second

// AddDisk implements hypervisor.VM.
func (v *vm) AddDisk(ctx context.Context, d hypervisor.Disk) (err error) {
	if err := d.Validate(); err != nil {
		return err
	}
	driver, err := diskDriver(d.Path)
	if err != nil {
		return fmt.Errorf("add disk %s: %w", d.ID, err)
	}
	e, err := v.disks.Reserve(d)
	if err != nil {
		return fmt.Errorf("add disk: %w", err)
	}
	address := e.Place
	defer func() {
		// With an outcome that is not known, the disk stays in the table for RemoveDisk.
		if err == nil || errors.Is(err, errNoAnswer) {
			v.disks.Keep(e)
		} else {
			v.disks.Release(e)
		}
	}()
	if err := v.plug(ctx, "blockdev-add", newBlockNode(d, driver, address)); err != nil {
		return fmt.Errorf("add disk %s (%s): %w", d.ID, d.Path, err)
	}
	if err := v.plug(ctx, "device_add", newSCSIDisk(d, address)); err != nil {
		if !errors.Is(err, errNoAnswer) {
			v.undo(ctx, "blockdev-del", map[string]string{"node-name": diskNodeName(address)})
		}
		return fmt.Errorf("add disk %s (%s): %w", d.ID, d.Path, err)
	}
	return nil
}

// errNoAnswer: QEMU did not say within plugTimeout whether it did something.
var errNoAnswer = fmt.Errorf("QEMU did not answer for %v: %w", plugTimeout, context.DeadlineExceeded)

// plug runs a command that changes the VM. These take milliseconds, and one that is given up half-way leaves nobody
// knowing what the VM has: so it is not begun after the end of ctx, but then waited for.
func (v *vm) plug(ctx context.Context, command string, arguments any) error {
	if err := context.Cause(ctx); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeoutCause(context.WithoutCancel(ctx), plugTimeout, errNoAnswer)
	defer cancel()
	return v.execute(ctx, command, arguments, nil)
}

// undo takes back a part of a change that failed. Its own failure is only logged.
func (v *vm) undo(ctx context.Context, command string, arguments any) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), plugTimeout)
	defer cancel()
	if err := v.qmp.Execute(ctx, command, arguments, nil); err != nil && v.qmp.Err() == nil {
		log.G(ctx).WithField("sandbox", v.doc.ID).WithError(err).Warn("clean-up after a failed hot-plug")
	}
}

// RemoveDisk implements hypervisor.VM. After an error it can be repeated.
func (v *vm) RemoveDisk(ctx context.Context, id string) (err error) {
	e, err := v.disks.Take(id)
	if err != nil {
		return fmt.Errorf("remove disk: %w", err)
	}
	defer func() {
		if err == nil {
			v.disks.Release(e)
		} else {
			v.disks.Keep(e)
		}
	}()
	if !e.Unplugged {
		if err := v.removeDevice(ctx, diskDeviceID(id)); err != nil {
			return fmt.Errorf("remove disk %s: %w", id, err)
		}
		e.Unplugged = true
	}
	if err := v.plug(ctx, "blockdev-del", map[string]string{"node-name": diskNodeName(e.Place)}); err != nil {
		return fmt.Errorf("remove disk %s: close its image: %w", id, err)
	}
	return nil
}

// removeDevice unplugs a device and waits until QEMU has let go of it.
func (v *vm) removeDevice(ctx context.Context, device string) error {
	gone := make(chan struct{})
	v.mu.Lock()
	v.deleted[device] = gone
	v.mu.Unlock()
	defer func() {
		v.mu.Lock()
		delete(v.deleted, device)
		v.mu.Unlock()
	}()
	err := v.plug(ctx, "device_del", map[string]string{"id": device})
	if errors.Is(err, errdefs.ErrNotFound) {
		return nil // by an earlier call that did not see the end
	}
	if err != nil {
		return err
	}
	select {
	case <-gone:
		return nil
	case <-v.Done():
		return v.EndedError()
	case <-ctx.Done():
		return fmt.Errorf("wait for QEMU to unplug it: %w", context.Cause(ctx))
	}
}

type chardevAdd struct {
	ID      string         `json:"id"`
	Backend chardevBackend `json:"backend"`
}

type chardevBackend struct {
	Type string        `json:"type"`
	Data chardevSocket `json:"data"`
}

type chardevSocket struct {
	Addr   chardevAddress `json:"addr"`
	Server bool           `json:"server"`
}

type chardevAddress struct {
	Type string            `json:"type"`
	Data map[string]string `json:"data"`
}

type fsDevice struct {
	Driver  string `json:"driver"`
	ID      string `json:"id"`
	Bus     string `json:"bus"`
	Chardev string `json:"chardev"`
	Tag     string `json:"tag"`
	Queue   int    `json:"queue-size"`
	ROM     string `json:"romfile"`
}

// fsQueue is the length of a virtio-fs queue; the default of 128 limits the requests under way.
const fsQueue = 1024

// AddSharedDirectory implements hypervisor.VM.
func (v *vm) AddSharedDirectory(ctx context.Context, s hypervisor.SharedDirectory) (err error) {
	if err := s.Validate(); err != nil {
		return err
	}
	if v.doc.Confidential != nil {
		return fmt.Errorf("add shared directory %s: this VM is confidential, and a directory of the host would be outside of what it protects; "+
			"give it a disk or copy the files into the guest: %w", s.ID, errdefs.ErrPermissionDenied)
	}
	port, err := v.shares.Reserve(s)
	if err != nil {
		return fmt.Errorf("add shared directory: %w", err)
	}
	defer func() {
		// With an outcome that is not known, the place stays taken.
		if err != nil && !errors.Is(err, errNoAnswer) {
			v.shares.Release(s)
		}
	}()
	chardev, device := "chr-share-"+s.ID, "share-"+s.ID
	backend := chardevBackend{Type: "socket", Data: chardevSocket{Addr: chardevAddress{Type: "unix",
		Data: map[string]string{"path": s.Socket}}}}
	if err := v.plug(ctx, "chardev-add", chardevAdd{ID: chardev, Backend: backend}); err != nil {
		return fmt.Errorf("add shared directory %s: connect to its server at %s: %w", s.ID, s.Socket, err)
	}
	dev := fsDevice{Driver: "vhost-user-fs-pci", ID: device, Bus: rootPortID(port), Chardev: chardev, Tag: s.Tag, Queue: fsQueue}
	if err := v.plug(ctx, "device_add", dev); err != nil {
		if !errors.Is(err, errNoAnswer) {
			v.undo(ctx, "chardev-remove", map[string]string{"id": chardev})
		}
		return fmt.Errorf("add shared directory %s: %w", s.ID, err)
	}
	return nil
}
