// SPDX-License-Identifier: Apache-2.0

package disks

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"

	agentv1 "github.com/cloister-project/cloister/agent-protocol/v1"
	"github.com/cloister-project/cloister/agent-protocol/wire"
	"github.com/cloister-project/cloister/hypervisor"
	"github.com/cloister-project/cloister/virtcontainers/rootfs"
)

// VM is what disks need of a VM (hypervisor.VM).
type VM interface {
	AddDisk(ctx context.Context, d hypervisor.Disk) error
	RemoveDisk(ctx context.Context, id string) error
}

// Set is the images plugged into one VM.
type Set struct {
	vm VM
	// hotplug bounds a disk's way into the VM.
	hotplug time.Duration

	mu    sync.Mutex
	next  int
	byKey map[string]*disk
}

type disk struct {
	id, serial string
	users      int
	// plugged is closed when AddDisk has returned; err is valid then.
	plugged chan struct{}
	err     error
}

// New returns a Set with no disk. hotplug bounds the time that one disk may take to be plugged in.
func New(vm VM, hotplug time.Duration) *Set {
	return &Set{vm: vm, hotplug: hotplug, byKey: map[string]*disk{}}
}

// Attach plugs a root filesystem's layers in, and returns what the agent is told of them. limit is how large the guest's
// writable layer may become in bytes, 0 for no limit of the node's. undo takes the steps that give the disks back, also
// when Attach fails half-way.
func (s *Set) Attach(ctx context.Context, root *rootfs.Rootfs, limit uint64, undo func(step func(context.Context))) (
	*agentv1.Rootfs, error) {
	if len(root.Layers) > wire.MaxLayers {
		return nil, fmt.Errorf("%d layers; the limit is %d: %w", len(root.Layers), wire.MaxLayers, errdefs.ErrInvalidArgument)
	}
	plug := func(key, path string) (string, error) {
		serial, err := s.plug(ctx, key, path)
		if err != nil {
			return "", fmt.Errorf("plug in %s: %w", path, err)
		}
		undo(func(ctx context.Context) { s.unplug(ctx, key) })
		return serial, nil
	}
	out := &agentv1.Rootfs{WritableBytes: limit}
	if size := uint64(max(root.WritableBytes, 0)); size > 0 && (limit == 0 || size < limit) {
		out.WritableBytes = size
	}
	for _, l := range root.Layers {
		serial, err := plug(l.Key, l.Path)
		if err != nil {
			return nil, err
		}
		layer := &agentv1.Layer{Filesystem: l.Filesystem, Serial: serial, IdMapped: l.Mapped}
		for _, extra := range l.Extra {
			serial, err := plug(extra, extra)
			if err != nil {
				return nil, err
			}
			layer.ExtraSerials = append(layer.ExtraSerials, serial)
		}
		out.Layers = append(out.Layers, layer)
	}
	return out, nil
}

// plug plugs an image in unless it is, and returns its serial number. Each plug that succeeds wants one unplug with the
// same key.
func (s *Set) plug(ctx context.Context, key, path string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, s.hotplug)
	defer cancel()
	s.mu.Lock()
	one, ok := s.byKey[key]
	if !ok {
		s.next++
		name := fmt.Sprintf("layer%d", s.next)
		one = &disk{id: name, serial: name, plugged: make(chan struct{})}
		s.byKey[key] = one
	}
	one.users++
	s.mu.Unlock()

	if !ok {
		one.err = s.vm.AddDisk(ctx, hypervisor.Disk{ID: one.id, Path: path, Serial: one.serial, ReadOnly: true})
		close(one.plugged)
	}
	select {
	case <-one.plugged:
	case <-ctx.Done():
		s.unplug(context.WithoutCancel(ctx), key)
		return "", ctx.Err()
	}
	if one.err != nil {
		s.drop(key, one)
		return "", one.err
	}
	return one.serial, nil
}

// drop gives a user's place back and reports whether it was the last.
func (s *Set) drop(key string, one *disk) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	one.users--
	if one.users > 0 {
		return false
	}
	if s.byKey[key] == one {
		delete(s.byKey, key)
	}
	return true
}

// unplug takes the image out when its last user has gone. What cannot be unplugged goes with the VM.
func (s *Set) unplug(ctx context.Context, key string) {
	s.mu.Lock()
	one, ok := s.byKey[key]
	s.mu.Unlock()
	if !ok || !s.drop(key, one) {
		return
	}
	select {
	case <-one.plugged:
	case <-ctx.Done():
		return
	}
	if one.err != nil {
		return
	}
	if err := s.vm.RemoveDisk(ctx, one.id); err != nil && !errdefs.IsFailedPrecondition(err) {
		log.G(ctx).WithError(err).WithField("disk", one.id).Warn("unplug of a layer's disk")
	}
}
