// SPDX-License-Identifier: Apache-2.0

package vmplan

import (
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
	"github.com/stretchr/testify/require"

	"github.com/cloister-project/cloister/configs"
)

func TestSizeVM(t *testing.T) {
	cfg := configs.Sizing{DefaultVCPUs: 1, DefaultMemoryMiB: 512, OverheadMemoryMiB: 256, MaxVCPUs: 8, MaxMemoryMiB: 4096}
	cpu := func(quota int64, period uint64) *specs.LinuxCPU {
		return &specs.LinuxCPU{Quota: &quota, Period: &period}
	}
	memory := func(limit int64) *specs.LinuxMemory { return &specs.LinuxMemory{Limit: &limit} }
	for _, tc := range []struct {
		name   string
		r      *specs.LinuxResources
		vcpus  int
		memory uint64
	}{
		{"nothing said", nil, 1, 512 << 20},
		{"empty", &specs.LinuxResources{}, 1, 512 << 20},
		{"no limit", &specs.LinuxResources{Memory: memory(-1), CPU: cpu(-1, 100000)}, 1, 512 << 20},
		{"zero period", &specs.LinuxResources{CPU: cpu(100, 0)}, 1, 512 << 20},
		{"limits", &specs.LinuxResources{Memory: memory(1 << 30), CPU: cpu(150000, 100000)}, 2, 1280 << 20},
		{"rounded up", &specs.LinuxResources{Memory: memory(1)}, 1, 258 << 20},
		{"bounded", &specs.LinuxResources{Memory: memory(1 << 40), CPU: cpu(6400000, 100000)}, 8, 4096 << 20},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got := SizeVM(cfg, tc.r)
			require.Equal(t, Size{tc.vcpus, tc.memory}, got)
		})
	}
}
