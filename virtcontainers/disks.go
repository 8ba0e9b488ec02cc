// SPDX-License-Identifier: Apache-2.0

package virtcontainers

import (
	"context"
	"fmt"
	"sync"

	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"

	agentv1 "github.com/cloister-project/cloister/agent-protocol/v1"
	"github.com/cloister-project/cloister/agent-protocol/wire"
	"github.com/cloister-project/cloister/hypervisor"
)

// disks are the images plugged into one VM, shared by the containers that need the same one.
type disks struct {
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

// attach plugs the image in unless it is, and returns its serial number. Each successful attach wants one detach with
// the same key.
func (d *disks) attach(ctx context.Context, vm hypervisor.VM, key, path string) (string, error) {
	d.mu.Lock()
	if d.byKey == nil {
		d.byKey = map[string]*disk{}
	}
	one, ok := d.byKey[key]
	if !ok {
		d.next++
		name := fmt.Sprintf("layer%d", d.next)
		one = &disk{id: name, serial: name, plugged: make(chan struct{})}
		d.byKey[key] = one
	}
	one.users++
	d.mu.Unlock()

	if !ok {
		one.err = vm.AddDisk(ctx, hypervisor.Disk{ID: one.id, Path: path, Serial: one.serial, ReadOnly: true})
		close(one.plugged)
	}
	select {
	case <-one.plugged:
	case <-ctx.Done():
		d.detach(context.WithoutCancel(ctx), vm, key)
		return "", ctx.Err()
	}
	if one.err != nil {
		d.drop(key, one)
		return "", one.err
	}
	return one.serial, nil
}

// drop gives a user's place back and tells whether it was the last.
func (d *disks) drop(key string, one *disk) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	one.users--
	if one.users > 0 {
		return false
	}
	if d.byKey[key] == one {
		delete(d.byKey, key)
	}
	return true
}

// detach unplugs the image when its last user has gone. What cannot be unplugged goes with the VM.
func (d *disks) detach(ctx context.Context, vm hypervisor.VM, key string) {
	d.mu.Lock()
	one, ok := d.byKey[key]
	d.mu.Unlock()
	if !ok || !d.drop(key, one) {
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
	if err := vm.RemoveDisk(ctx, one.id); err != nil && !errdefs.IsFailedPrecondition(err) {
		log.G(ctx).WithError(err).WithField("disk", one.id).Warn("unplug of a layer's disk")
	}
}

// attachRootfs makes the container's layers into disks of the VM.
func (p *Pod) attachRootfs(ctx context.Context, c *Container, mounts []*types.Mount) (*agentv1.Rootfs, error) {
	root, err := p.rootfs.Resolve(ctx, mounts)
	if err != nil {
		return nil, err
	}
	c.cleanup.add(func(ctx context.Context) {
		if err := root.Release(); err != nil {
			log.G(ctx).WithError(err).Warn("release layer images")
		}
	})
	if len(root.Layers) > wire.MaxLayers {
		return nil, fmt.Errorf("%d layers; the limit is %d: %w", len(root.Layers), wire.MaxLayers, errdefs.ErrInvalidArgument)
	}
	out := &agentv1.Rootfs{WritableBytes: uint64(p.cfg.Config.Rootfs.WritableLayerMaxMiB) << 20}
	if size := uint64(max(root.WritableBytes, 0)); size > 0 && (out.WritableBytes == 0 || size < out.WritableBytes) {
		out.WritableBytes = size
	}
	for _, l := range root.Layers {
		layer := &agentv1.Layer{Filesystem: l.Filesystem}
		if layer.Serial, err = p.attachDisk(ctx, c, l.Key, l.Path); err != nil {
			return nil, err
		}
		for _, extra := range l.Extra {
			serial, err := p.attachDisk(ctx, c, extra, extra)
			if err != nil {
				return nil, err
			}
			layer.ExtraSerials = append(layer.ExtraSerials, serial)
		}
		out.Layers = append(out.Layers, layer)
	}
	return out, nil
}

func (p *Pod) attachDisk(ctx context.Context, c *Container, key, path string) (string, error) {
	vm := p.machine()
	if vm == nil {
		return "", p.lostError()
	}
	ctx, cancel := context.WithTimeout(ctx, p.cfg.Config.Timeouts.Hotplug)
	defer cancel()
	serial, err := p.disks.attach(ctx, vm, key, path)
	if err != nil {
		return "", fmt.Errorf("plug in %s: %w", path, err)
	}
	c.cleanup.add(func(ctx context.Context) { p.disks.detach(ctx, vm, key) })
	return serial, nil
}
