// SPDX-License-Identifier: Apache-2.0

package hotplug

import (
	"fmt"
	"sync"

	"github.com/containerd/errdefs"

	"github.com/cloister-project/cloister/hypervisor"
)

// Directories is the places for shared directories. Methods may be called from any goroutine.
type Directories struct {
	mu   sync.Mutex
	byID map[string]int // place by SharedDirectory.ID
	tags map[string]bool
	free []int
}

// NewDirectories returns a table of so many places.
func NewDirectories(places int) *Directories {
	t := &Directories{byID: make(map[string]int), tags: make(map[string]bool)}
	for i := range places {
		t.free = append(t.free, i)
	}
	return t
}

// Reserve takes id, tag and a place, whose number it returns. errdefs.ErrAlreadyExists: the id or the tag is taken;
// ErrResourceExhausted: every place is.
func (t *Directories) Reserve(s hypervisor.SharedDirectory) (place int, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if _, ok := t.byID[s.ID]; ok {
		return 0, fmt.Errorf("the VM has a shared directory with the id %s: %w", s.ID, errdefs.ErrAlreadyExists)
	}
	if t.tags[s.Tag] {
		return 0, fmt.Errorf("the VM has a shared directory with the tag %s: %w", s.Tag, errdefs.ErrAlreadyExists)
	}
	if len(t.free) == 0 {
		return 0, fmt.Errorf("all %d places for shared directories are taken: %w", len(t.byID), errdefs.ErrResourceExhausted)
	}
	place, t.free = t.free[0], t.free[1:]
	t.byID[s.ID], t.tags[s.Tag] = place, true
	return place, nil
}

// Release gives back what Reserve took.
func (t *Directories) Release(s hypervisor.SharedDirectory) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.free = append(t.free, t.byID[s.ID])
	delete(t.byID, s.ID)
	delete(t.tags, s.Tag)
}
