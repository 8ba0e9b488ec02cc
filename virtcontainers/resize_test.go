// SPDX-License-Identifier: Apache-2.0

package virtcontainers

import (
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
	"github.com/stretchr/testify/require"
)

func TestTogether(t *testing.T) {
	limits := func(memory, quota int64, period uint64) *specs.LinuxResources {
		return &specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: &memory}, CPU: &specs.LinuxCPU{Quota: &quota, Period: &period}}
	}
	p := &Pod{containers: map[string]*Container{}}
	add := func(id string, r *specs.LinuxResources) *Container {
		c := &Container{id: id, pod: p, spec: &specs.Spec{Linux: &specs.Linux{Resources: r}}}
		c.init = &Process{container: c, status: ProcessRunning}
		p.containers[id] = c
		return c
	}
	c := add("c", limits(100, 50_000, 100_000))
	add("half", limits(200, 100_000, 200_000))
	add("unlimited", limits(-1, -1, 100_000))
	add("none", nil)
	p.containers["noLinux"] = &Container{id: "noLinux", pod: p, spec: &specs.Spec{}, init: &Process{status: ProcessRunning}}
	p.containers["noLinux"].init.container = p.containers["noLinux"]
	add("ended", limits(1<<40, 1<<40, 1)).init.status = ProcessStopped

	sum := p.together(c, limits(101, 50_001, 100_000))
	require.EqualValues(t, 301, *sum.Memory.Limit)
	require.EqualValues(t, 100_001, *sum.CPU.Quota)
	require.EqualValues(t, 100_000, *sum.CPU.Period)
	for _, r := range []*specs.LinuxResources{nil, {}, limits(100, 50_000, 100_000), limits(1, 1, 100_000), limits(-1, -1, 100_000),
		limits(0, 100_000, 200_000)} {
		require.Equal(t, &specs.LinuxResources{}, p.together(c, r), "nothing is raised")
	}
	require.Nil(t, p.together(c, limits(500, 0, 0)).CPU)
	require.EqualValues(t, 350, *p.together(p.containers["none"], limits(50, 0, 0)).Memory.Limit, "a limit where there was none")
}
