// SPDX-License-Identifier: Apache-2.0

package hotplug

import (
	"fmt"
	"sync"

	"github.com/containerd/errdefs"

	"github.com/cloister-project/cloister/hypervisor"
)

// Disks is what a VM has in disks. Methods may be called from any goroutine.
type Disks struct {
	max int

	mu      sync.Mutex
	byID    map[string]*Disk
	serials map[string]bool
	used    map[int]bool
	// next is where the search for a free place begins. Places are taken in turn: the guest handles the events of its
	// disks concurrently, and must not see one place go and come back at once.
	next int
}

// Disk is a disk in the table.
type Disk struct {
	hypervisor.Disk
	// Place is the number of the disk's place in the VM, from 0 on.
	Place int
	// Unplugged: the guest has it no more, and its removal has not come to its end. It belongs to who reserved or took the
	// disk.
	Unplugged bool

	busy bool
}

// NewDisks returns a table of up to max places, with the disks of boot in the first ones.
func NewDisks(boot []hypervisor.Disk, max int) *Disks {
	t := &Disks{max: max, byID: make(map[string]*Disk), serials: make(map[string]bool), used: make(map[int]bool), next: len(boot)}
	for i, d := range boot {
		t.byID[d.ID] = &Disk{Disk: d, Place: i}
		t.serials[d.Serial], t.used[i] = true, true
	}
	return t
}

// Reserve takes id, serial and a place for a disk that is being added; Keep or Release follows. errdefs.ErrAlreadyExists: the
// id or the serial is taken; ErrResourceExhausted: every place is.
func (t *Disks) Reserve(d hypervisor.Disk) (*Disk, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	switch {
	case t.byID[d.ID] != nil:
		return nil, fmt.Errorf("the VM has a disk with the id %s: %w", d.ID, errdefs.ErrAlreadyExists)
	case t.serials[d.Serial]:
		return nil, fmt.Errorf("the VM has a disk with the serial %s: %w", d.Serial, errdefs.ErrAlreadyExists)
	case len(t.used) >= t.max:
		return nil, fmt.Errorf("the VM has %d disks already: %w", t.max, errdefs.ErrResourceExhausted)
	}
	for t.used[t.next%t.max] {
		t.next++
	}
	e := &Disk{Disk: d, Place: t.next % t.max, busy: true}
	t.next = e.Place + 1
	t.byID[d.ID] = e
	t.serials[d.Serial], t.used[e.Place] = true, true
	return e, nil
}

// Take takes a disk that is to be removed; Keep or Release follows. errdefs.ErrNotFound: there is none with the id;
// ErrUnavailable: it is being added or removed.
func (t *Disks) Take(id string) (*Disk, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	switch e := t.byID[id]; {
	case e == nil:
		return nil, fmt.Errorf("the VM has no disk with the id %q: %w", id, errdefs.ErrNotFound)
	case e.busy:
		return nil, fmt.Errorf("disk %s is being added or removed: %w", id, errdefs.ErrUnavailable)
	default:
		e.busy = true
		return e, nil
	}
}

// Keep leaves a disk in the table that was reserved or taken.
func (t *Disks) Keep(e *Disk) {
	t.mu.Lock()
	defer t.mu.Unlock()
	e.busy = false
}

// Release removes a disk from the table that was reserved or taken.
func (t *Disks) Release(e *Disk) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.byID, e.ID)
	delete(t.serials, e.Serial)
	delete(t.used, e.Place)
}
