// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"context"
	"encoding/json"
	"fmt"

	"github.com/containerd/errdefs"

	"github.com/cloister-project/cloister/hypervisor"
)

// memoryDevice is the virtio-mem device, through which the guest gets more memory.
const memoryDevice = "memory0"

// Grows implements hypervisor.Driver.
func (d *Driver) Grows() bool { return d.config.Arch == hypervisor.ArchAMD64 }

// Grow implements hypervisor.VM.
func (v *vm) Grow(ctx context.Context, memoryBytes uint64) error {
	if err := v.doc.CheckGrowth(memoryBytes); err != nil {
		return err
	}
	select {
	case v.growing <- struct{}{}:
		defer func() { <-v.growing }()
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	if err := v.addMemory(ctx, memoryBytes); err != nil {
		return fmt.Errorf("add memory: %w", err)
	}
	return nil
}

// addMemory asks the guest to take more, and waits until it has.
func (v *vm) addMemory(ctx context.Context, bytes uint64) error {
	if bytes <= v.doc.Memory.Bytes {
		return nil
	}
	want := bytes - v.doc.Memory.Bytes
	const path = "/machine/peripheral/" + memoryDevice
	property := func(name string) map[string]any { return map[string]any{"path": path, "property": name} }
	var asked uint64
	if err := v.execute(ctx, "qom-get", property("requested-size"), &asked); err != nil {
		return err
	}
	// Events are counted from here on, and the size is read after: no change is missed.
	changed := v.sizeChanged()
	if asked < want {
		request := property("requested-size")
		request["value"] = want
		if err := v.plug(ctx, "qom-set", request); err != nil {
			return err
		}
	}
	for {
		var has uint64
		if err := v.execute(ctx, "qom-get", property("size"), &has); err != nil {
			return err
		}
		if has >= want {
			return nil
		}
		select {
		case <-changed:
			changed = v.sizeChanged()
		case <-v.Done():
			return v.EndedError()
		case <-ctx.Done():
			// What it has stays; it must not come upon the rest later, when nobody counts on it.
			back := property("requested-size")
			back["value"] = has
			v.undo(ctx, "qom-set", back)
			return fmt.Errorf("the guest took %d MiB of %d MiB (has its kernel virtio_mem?): %w: %w", has>>20, want>>20,
				context.Cause(ctx), errdefs.ErrOutOfRange)
		}
	}
}

// sizeChanged returns a channel that is closed at the next change of the memory device's size.
func (v *vm) sizeChanged() <-chan struct{} {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.memoryChanged == nil {
		v.memoryChanged = make(chan struct{})
	}
	return v.memoryChanged
}

// onSizeChange is called with QEMU's MEMORY_DEVICE_SIZE_CHANGE.
func (v *vm) onSizeChange(data json.RawMessage) {
	var d struct{ ID string }
	_ = json.Unmarshal(data, &d)
	v.mu.Lock()
	defer v.mu.Unlock()
	if d.ID == memoryDevice && v.memoryChanged != nil {
		close(v.memoryChanged)
		v.memoryChanged = nil
	}
}
