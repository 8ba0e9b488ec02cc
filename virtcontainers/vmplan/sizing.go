// SPDX-License-Identifier: Apache-2.0

package vmplan

import (
	"fmt"

	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/cloister-project/cloister/configs"
	"github.com/cloister-project/cloister/hypervisor"
)

// memoryStep is what guest memory is rounded up to: a huge page.
const memoryStep = 2 << 20

// Size of a VM.
type Size struct {
	VCPUs       int
	MemoryBytes uint64
}

// SizeVM sizes a VM by the pod's limits: a memory limit plus the overhead for the guest itself, and as many CPUs as the
// CPU limit needs. A limit that is not stated gives the default.
func SizeVM(cfg configs.Sizing, r *specs.LinuxResources) Size {
	size := Size{VCPUs: cfg.DefaultVCPUs, MemoryBytes: uint64(cfg.DefaultMemoryMiB) << 20}
	if r != nil && r.Memory != nil && r.Memory.Limit != nil && *r.Memory.Limit > 0 {
		size.MemoryBytes = uint64(*r.Memory.Limit) + uint64(cfg.OverheadMemoryMiB)<<20
	}
	if r != nil && r.CPU != nil && r.CPU.Quota != nil && *r.CPU.Quota > 0 && r.CPU.Period != nil && *r.CPU.Period > 0 {
		period := *r.CPU.Period
		size.VCPUs = int((uint64(*r.CPU.Quota) + period - 1) / period)
	}
	if cfg.MaxVCPUs > 0 {
		size.VCPUs = min(size.VCPUs, cfg.MaxVCPUs)
	}
	size.VCPUs = max(size.VCPUs, 1)
	if limit := uint64(cfg.MaxMemoryMiB) << 20; limit > 0 {
		size.MemoryBytes = min(size.MemoryBytes, limit)
	}
	size.MemoryBytes = (size.MemoryBytes + memoryStep - 1) / memoryStep * memoryStep
	return size
}

// leaveRoom lets a VM of a size grow while it runs: it has memory that can be plugged in, and CPUs that its kernel does not start. (CPUs
// that are plugged in later are no more than that to a VM, and Linux takes none where it sees no hypervisor, as under emulation.)
func (p *Plan) leaveRoom(doc *hypervisor.Document, size Size) {
	cfg := p.cfg.Sizing
	cpus := size.VCPUs + cfg.GrowVCPUs
	if cfg.MaxVCPUs > 0 {
		cpus = min(cpus, cfg.MaxVCPUs)
	}
	if cpus > size.VCPUs && !doc.Boot.Sealed {
		doc.CPU.Count = cpus
		doc.Boot.Parameters = append(doc.Boot.Parameters, fmt.Sprintf("maxcpus=%d", size.VCPUs))
	}
	memory := size.MemoryBytes + uint64(cfg.GrowMemoryMiB)<<20
	if limit := uint64(cfg.MaxMemoryMiB) << 20; limit > 0 {
		memory = min(memory, limit)
	}
	memory = memory / memoryStep * memoryStep
	if memory > size.MemoryBytes && p.driver.Grows() {
		doc.Memory.MaxBytes = memory
	}
}

// Size is what the pod's VM starts with.
func (p *Plan) Size() Size { return SizeVM(p.cfg.Sizing, p.pod.Resources) }
