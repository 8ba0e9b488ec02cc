// SPDX-License-Identifier: Apache-2.0

package virtcontainers

import (
	"context"
	"fmt"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/cloister-project/cloister/configs"
	"github.com/cloister-project/cloister/hypervisor"
	"github.com/cloister-project/cloister/virtcontainers/ocispec"
	"github.com/cloister-project/cloister/virtcontainers/vmplan"
)

// makeRoom makes the VM as large as limits need that are not smaller than what it has. What is not stated needs nothing.
func (p *Pod) makeRoom(ctx context.Context, now *running, r *specs.LinuxResources) error {
	select {
	case p.growing <- struct{}{}:
		defer func() { <-p.growing }()
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	has := p.plan.Size()
	want, err := needs(now.document, has, p.cfg.Config.Sizing, r)
	if err != nil {
		return err
	}
	has = vmplan.Size{VCPUs: max(has.VCPUs, p.grown.VCPUs), MemoryBytes: max(has.MemoryBytes, p.grown.MemoryBytes)}
	if want.VCPUs <= has.VCPUs && want.MemoryBytes <= has.MemoryBytes {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, p.cfg.Config.Timeouts.Hotplug)
	defer cancel()
	if want.MemoryBytes > has.MemoryBytes {
		if err := now.vm.Grow(ctx, want.MemoryBytes); err != nil {
			return fmt.Errorf("make the VM larger: %w", err)
		}
		p.grown.MemoryBytes = want.MemoryBytes
	}
	if want.VCPUs > has.VCPUs {
		if err := now.guest.OnlineCPUs(ctx, want.VCPUs); err != nil {
			return fmt.Errorf("bring more of the guest's CPUs online: %w", err)
		}
		p.grown.VCPUs = want.VCPUs
	}
	log.G(ctx).WithField("vcpus", p.grown.VCPUs).WithField("memory", p.grown.MemoryBytes).Info("the VM has grown")
	return nil
}

// needs returns the size of the VM that limits ask for, as far as it is more than the VM was started with; 0 for what is not.
// errdefs.ErrOutOfRange: the VM has no room for them.
func needs(doc *hypervisor.Document, started vmplan.Size, cfg configs.Sizing, r *specs.LinuxResources) (vmplan.Size, error) {
	var need vmplan.Size
	if r == nil {
		return need, nil
	}
	want := vmplan.SizeVM(configs.Sizing{
		DefaultVCPUs: 1, OverheadMemoryMiB: cfg.OverheadMemoryMiB, // without a maximum: that is refused and not lowered
	}, r)
	if r.CPU != nil && r.CPU.Quota != nil && *r.CPU.Quota > 0 && want.VCPUs > started.VCPUs {
		need.VCPUs = want.VCPUs
		if most := doc.CPU.Count; want.VCPUs > most {
			return need, fmt.Errorf("a limit of %d CPUs: the VM was started with %d and can grow to %d (sizing.grow_vcpus); make the pod anew: %w",
				want.VCPUs, started.VCPUs, most, errdefs.ErrOutOfRange)
		}
	}
	if r.Memory != nil && r.Memory.Limit != nil && *r.Memory.Limit > 0 && want.MemoryBytes > doc.Memory.Bytes {
		need.MemoryBytes = want.MemoryBytes
		if most := max(doc.Memory.MaxBytes, doc.Memory.Bytes); want.MemoryBytes > most {
			return need, fmt.Errorf("a limit of %d MiB needs a VM of %d MiB: it was started with %d MiB and can grow to %d MiB "+
				"(sizing.grow_memory_mib); make the pod anew: %w",
				*r.Memory.Limit>>20, want.MemoryBytes>>20, doc.Memory.Bytes>>20, most>>20, errdefs.ErrOutOfRange)
		}
	}
	return need, nil
}

// together returns what the pod's containers may use in all if limits of one become others, of what these raise: a limit that stays, or
// gets lower, needs no room, however the containers share the VM that they have. Containers without a limit, and those that have
// ended, do not count.
func (p *Pod) together(changed *Container, r *specs.LinuxResources) *specs.LinuxResources {
	old := changed.limits()
	next := merge(old, r)
	memory, quota := memoryOf(next), quotaOf(next)
	for _, c := range p.Containers() {
		if c != changed && c.init.State().Status != ProcessStopped {
			memory += memoryOf(c.limits())
			quota += quotaOf(c.limits())
		}
	}
	period := uint64(quotaPeriod)
	sum := &specs.LinuxResources{}
	if raised(memoryOf(old), memoryOf(next)) {
		sum.Memory = &specs.LinuxMemory{Limit: &memory}
	}
	if raised(quotaOf(old), quotaOf(next)) {
		sum.CPU = &specs.LinuxCPU{Quota: &quota, Period: &period}
	}
	return sum
}

// raised reports whether a limit is more than it was, or was none.
func raised(old, next int64) bool { return next > 0 && (old == 0 || next > old) }

// memoryOf is the memory limit in bytes, 0 for none.
func memoryOf(r *specs.LinuxResources) int64 {
	if r.Memory == nil || r.Memory.Limit == nil {
		return 0
	}
	return max(0, *r.Memory.Limit)
}

// quotaPeriod is what quotas of containers are added up for, microseconds.
const quotaPeriod = 100_000

// quotaOf is the CPU limit, microseconds in quotaPeriod; 0 for none.
func quotaOf(r *specs.LinuxResources) int64 {
	if r.CPU == nil || r.CPU.Quota == nil || r.CPU.Period == nil || *r.CPU.Quota <= 0 || *r.CPU.Period == 0 {
		return 0
	}
	return int64(float64(*r.CPU.Quota) * quotaPeriod / float64(*r.CPU.Period))
}

// merge returns limits with those that others state in their place; only what sizes a VM.
func merge(old, r *specs.LinuxResources) *specs.LinuxResources {
	out := &specs.LinuxResources{}
	for _, from := range []*specs.LinuxResources{old, r} {
		if from == nil {
			continue
		}
		if from.Memory != nil && from.Memory.Limit != nil {
			out.Memory = &specs.LinuxMemory{Limit: from.Memory.Limit}
		}
		if from.CPU != nil && from.CPU.Quota != nil && from.CPU.Period != nil {
			out.CPU = &specs.LinuxCPU{Quota: from.CPU.Quota, Period: from.CPU.Period}
		}
	}
	return out
}

// limits are what the container has now.
func (c *Container) limits() *specs.LinuxResources {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.updated != nil {
		return c.updated
	}
	if c.spec.Linux == nil {
		return merge(nil, nil)
	}
	return merge(c.spec.Linux.Resources, nil)
}

// Update changes the container's resource limits in the guest, after the VM has grown for those of all containers.
// errdefs.ErrOutOfRange: limits above what the VM can have.
func (c *Container) Update(ctx context.Context, r *specs.LinuxResources) error {
	now, err := c.pod.ready()
	if err != nil {
		return err
	}
	resources, err := ocispec.Resources(r)
	if err != nil {
		return err
	}
	// A limit that the VM cannot hold would be a lie.
	if err := c.pod.makeRoom(ctx, now, c.pod.together(c, r)); err != nil {
		return fmt.Errorf("container %s: %w", c.id, err)
	}
	if err := c.pod.agent().UpdateContainer(ctx, c.id, resources); err != nil {
		return err
	}
	limits := merge(c.limits(), r)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.updated = limits
	return nil
}
