// SPDX-License-Identifier: Apache-2.0

package virtcontainers

import (
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/cloister-project/cloister/configs"
)

// memoryStep is what guest memory is rounded up to: a huge page.
const memoryStep = 2 << 20

// vmSize is the size of a VM.
type vmSize struct {
	vcpus  int
	memory uint64 // bytes
}

// sizeVM sizes a VM by the pod's limits: a memory limit plus the overhead for the guest itself, and as many CPUs as the
// CPU limit needs. A limit that is not stated gives the default.
func sizeVM(cfg configs.Sizing, r *specs.LinuxResources) vmSize {
	size := vmSize{vcpus: cfg.DefaultVCPUs, memory: uint64(cfg.DefaultMemoryMiB) << 20}
	if r != nil && r.Memory != nil && r.Memory.Limit != nil && *r.Memory.Limit > 0 {
		size.memory = uint64(*r.Memory.Limit) + uint64(cfg.OverheadMemoryMiB)<<20
	}
	if r != nil && r.CPU != nil && r.CPU.Quota != nil && *r.CPU.Quota > 0 && r.CPU.Period != nil && *r.CPU.Period > 0 {
		period := *r.CPU.Period
		size.vcpus = int((uint64(*r.CPU.Quota) + period - 1) / period)
	}
	if cfg.MaxVCPUs > 0 {
		size.vcpus = min(size.vcpus, cfg.MaxVCPUs)
	}
	size.vcpus = max(size.vcpus, 1)
	if limit := uint64(cfg.MaxMemoryMiB) << 20; limit > 0 {
		size.memory = min(size.memory, limit)
	}
	size.memory = (size.memory + memoryStep - 1) / memoryStep * memoryStep
	return size
}
