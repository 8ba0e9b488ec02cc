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

// diskTable is what the VM has in disks. vm.mu guards it.
type diskTable struct {
	byID    map[string]*diskEntry
	serials map[string]bool
	used    map[int]bool // addresses
	// next is where the search for a free address begins. Addresses are taken in turn: the guest handles the events of
	// its disks concurrently, and must not see one address go and come back at once.
	next int
}

type diskEntry struct {
	serial  string
	address int
	// busy while being added or removed.
	busy bool
	// deviceGone: the device was removed but its image is still open.
	deviceGone bool
}

func newDiskTable(boot []hypervisor.Disk) diskTable {
	t := diskTable{byID: make(map[string]*diskEntry), serials: make(map[string]bool), used: make(map[int]bool)}
	for i, d := range boot {
		t.byID[d.ID] = &diskEntry{serial: d.Serial, address: i}
		t.serials[d.Serial], t.used[i] = true, true
	}
	t.next = len(boot)
	return t
}

// reserve takes the id, the serial and an address for a disk that is being added.
func (t *diskTable) reserve(d hypervisor.Disk) (address int, err error) {
	switch {
	case t.byID[d.ID] != nil:
		return 0, fmt.Errorf("the VM has a disk with the id %s: %w", d.ID, errdefs.ErrAlreadyExists)
	case t.serials[d.Serial]:
		return 0, fmt.Errorf("the VM has a disk with the serial %s: %w", d.Serial, errdefs.ErrAlreadyExists)
	case len(t.used) >= maxDisks:
		return 0, fmt.Errorf("the VM has %d disks already: %w", maxDisks, errdefs.ErrResourceExhausted)
	}
	for t.used[t.next%maxDisks] {
		t.next++
	}
	address = t.next % maxDisks
	t.next = address + 1
	t.byID[d.ID] = &diskEntry{serial: d.Serial, address: address, busy: true}
	t.serials[d.Serial], t.used[address] = true, true
	return address, nil
}

func (t *diskTable) release(id string) {
	e := t.byID[id]
	delete(t.byID, id)
	delete(t.serials, e.serial)
	delete(t.used, e.address)
}

// AddDisk implements hypervisor.VM.
func (v *vm) AddDisk(ctx context.Context, d hypervisor.Disk) (err error) {
	if err := d.Validate(); err != nil {
		return err
	}
	driver, err := diskDriver(d.Path)
	if err != nil {
		return fmt.Errorf("add disk %s: %w", d.ID, err)
	}
	v.mu.Lock()
	address, err := v.disks.reserve(d)
	v.mu.Unlock()
	if err != nil {
		return fmt.Errorf("add disk: %w", err)
	}
	defer func() {
		v.mu.Lock()
		defer v.mu.Unlock()
		v.disks.byID[d.ID].busy = false
		// With an outcome that is not known, the disk stays in the table for RemoveDisk.
		if err != nil && !errors.Is(err, errNoAnswer) {
			v.disks.release(d.ID)
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
	device := diskDeviceID(id)
	v.mu.Lock()
	e := v.disks.byID[id]
	switch {
	case e == nil:
		err = fmt.Errorf("remove disk: the VM has no disk with the id %q: %w", id, errdefs.ErrNotFound)
	case e.busy:
		err = fmt.Errorf("remove disk %s: it is being added or removed: %w", id, errdefs.ErrUnavailable)
	}
	if err != nil {
		v.mu.Unlock()
		return err
	}
	e.busy = true
	gone := make(chan struct{})
	if !e.deviceGone {
		v.deleted[device] = gone
	}
	v.mu.Unlock()
	defer func() {
		v.mu.Lock()
		defer v.mu.Unlock()
		e.busy = false
		delete(v.deleted, device)
		if err == nil {
			v.disks.release(id)
		}
	}()
	if !e.deviceGone {
		if err := v.removeDevice(ctx, device, gone); err != nil {
			return fmt.Errorf("remove disk %s: %w", id, err)
		}
		e.deviceGone = true // ours while busy
	}
	if err := v.plug(ctx, "blockdev-del", map[string]string{"node-name": diskNodeName(e.address)}); err != nil {
		return fmt.Errorf("remove disk %s: close its image: %w", id, err)
	}
	return nil
}

// removeDevice unplugs a device and waits until QEMU has let go of it.
func (v *vm) removeDevice(ctx context.Context, device string, gone <-chan struct{}) error {
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
	case <-v.done:
		return fmt.Errorf("%w: %w", errdefs.ErrFailedPrecondition, v.exit)
	case <-ctx.Done():
		return fmt.Errorf("wait for QEMU to unplug it: %w", context.Cause(ctx))
	}
}

// shareTable is the places for shared directories. vm.mu guards it.
type shareTable struct {
	byID map[string]int // port by SharedDirectory.ID
	tags map[string]bool
	free []int
}

func newShareTable(ports int) shareTable {
	t := shareTable{byID: make(map[string]int), tags: make(map[string]bool)}
	for i := range ports {
		t.free = append(t.free, i)
	}
	return t
}

func (t *shareTable) reserve(s hypervisor.SharedDirectory) (port int, err error) {
	if _, ok := t.byID[s.ID]; ok {
		return 0, fmt.Errorf("the VM has a shared directory with the id %s: %w", s.ID, errdefs.ErrAlreadyExists)
	}
	if t.tags[s.Tag] {
		return 0, fmt.Errorf("the VM has a shared directory with the tag %s: %w", s.Tag, errdefs.ErrAlreadyExists)
	}
	if len(t.free) == 0 {
		return 0, fmt.Errorf("all %d places for shared directories are taken: %w", len(t.byID), errdefs.ErrResourceExhausted)
	}
	port, t.free = t.free[0], t.free[1:]
	t.byID[s.ID], t.tags[s.Tag] = port, true
	return port, nil
}

func (t *shareTable) release(s hypervisor.SharedDirectory) {
	t.free = append(t.free, t.byID[s.ID])
	delete(t.byID, s.ID)
	delete(t.tags, s.Tag)
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
	v.mu.Lock()
	port, err := v.shares.reserve(s)
	v.mu.Unlock()
	if err != nil {
		return fmt.Errorf("add shared directory: %w", err)
	}
	defer func() {
		// With an outcome that is not known, the place stays taken.
		if err != nil && !errors.Is(err, errNoAnswer) {
			v.mu.Lock()
			v.shares.release(s)
			v.mu.Unlock()
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
