// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"strconv"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cloister-project/cloister/test/harness"
)

const mib = 1 << 20

// limited changes a container's resources.
func limited(r *runtimeapi.LinuxContainerResources) func(*runtimeapi.ContainerConfig) {
	return func(c *runtimeapi.ContainerConfig) { c.Linux.Resources = r }
}

// checkResources is about limits, what happens at them, and statistics.
func checkResources(t *testing.T, n *harness.Node, pod *harness.Pod) {
	t.Run("out of memory", func(t *testing.T) {
		for _, c := range []struct{ name, script string }{
			{"init", "exec dd if=/dev/zero of=/dev/null bs=200M count=1"},
			{"at once", "dd if=/dev/zero of=/dev/null bs=200M count=1; exit $?"},
		} {
			t.Run(c.name, func(t *testing.T) {
				status, _, _ := ended(t, pod, harness.ContainerSpec{
					Script: c.script, Change: limited(&runtimeapi.LinuxContainerResources{MemoryLimitInBytes: 48 * mib}),
				})
				assert.EqualValues(t, 137, status.GetExitCode())
				assert.Equal(t, "OOMKilled", status.GetReason())
			})
		}
	})
	t.Run("number of processes", func(t *testing.T) {
		c := runContainer(t, pod, harness.ContainerSpec{
			Change: limited(&runtimeapi.LinuxContainerResources{Unified: map[string]string{"pids.max": "20"}}),
		})
		assert.Equal(t, "20", output(t, c, "cat /sys/fs/cgroup/pids.max"))
		result, err := c.Exec(testContext(t), "sh", "-c", "for i in $(seq 40); do sleep 1000 > /dev/null 2>&1 & done")
		require.NoError(t, err)
		assert.Contains(t, result.Stderr, "can't fork")
	})
	t.Run("update", func(t *testing.T) { checkUpdate(t, n, pod) })
	t.Run("stats", func(t *testing.T) { checkStats(t, n, pod) })
}

func checkUpdate(t *testing.T, n *harness.Node, pod *harness.Pod) {
	ctx := testContext(t)
	c := runContainer(t, pod, harness.ContainerSpec{Change: limited(&runtimeapi.LinuxContainerResources{
		MemoryLimitInBytes: 64 * mib, CpuQuota: 50000, CpuPeriod: 100000, CpuShares: 512,
	})})
	const show = "cd /sys/fs/cgroup && cat memory.max cpu.max cpu.weight"
	assert.Equal(t, "67108864\n50000 100000", firstLines(output(t, c, show), 2))
	weight := lastLine(output(t, c, show))
	_, err := n.CRI().Runtime.UpdateContainerResources(ctx, &runtimeapi.UpdateContainerResourcesRequest{
		ContainerId: c.ID,
		Linux:       &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: 96 * mib, CpuQuota: 80000, CpuPeriod: 100000, CpuShares: 2048},
	})
	require.NoError(t, err)
	assert.Equal(t, "100663296\n80000 100000", firstLines(output(t, c, show), 2))
	assert.NotEqual(t, weight, lastLine(output(t, c, show)))
	// What the VM cannot hold is refused, and nothing changes.
	for _, more := range []*runtimeapi.LinuxContainerResources{
		{MemoryLimitInBytes: 64 << 30, CpuQuota: 80000, CpuPeriod: 100000}, {MemoryLimitInBytes: 96 * mib, CpuQuota: 6400000, CpuPeriod: 100000},
	} {
		_, err = n.CRI().Runtime.UpdateContainerResources(ctx, &runtimeapi.UpdateContainerResourcesRequest{ContainerId: c.ID, Linux: more})
		require.ErrorContains(t, err, "make the pod anew")
	}
	assert.Equal(t, "100663296\n80000 100000", firstLines(output(t, c, show), 2))
	status, err := c.Status(ctx)
	require.NoError(t, err)
	assert.EqualValues(t, 96*mib, status.GetResources().GetLinux().GetMemoryLimitInBytes())
}

func checkStats(t *testing.T, n *harness.Node, pod *harness.Pod) {
	ctx := testContext(t)
	c := runContainer(t, pod, harness.ContainerSpec{
		Script: "head -c 20000000 /dev/zero > /dev/shm/fill; i=0; while [ $i -lt 2000 ]; do i=$((i+1)); done; echo ready; " + idle,
	})
	require.NoError(t, c.WaitLog(ctx, "ready\n"))
	t.Run("container", func(t *testing.T) {
		s, err := c.Stats(ctx)
		require.NoError(t, err)
		assert.Equal(t, c.ID, s.GetAttributes().GetId())
		assert.Positive(t, s.GetCpu().GetUsageCoreNanoSeconds().GetValue())
		assert.Greater(t, s.GetMemory().GetUsageBytes().GetValue(), uint64(20000000))
		kernel, err := strconv.ParseUint(output(t, c, "cat /sys/fs/cgroup/memory.current"), 10, 64)
		require.NoError(t, err)
		assert.InDelta(t, kernel, s.GetMemory().GetUsageBytes().GetValue(), 8*mib, "it is what the guest's cgroup says")
	})
	t.Run("list", func(t *testing.T) {
		answer, err := n.CRI().Runtime.ListContainerStats(ctx, &runtimeapi.ListContainerStatsRequest{
			Filter: &runtimeapi.ContainerStatsFilter{PodSandboxId: pod.ID, Id: c.ID},
		})
		require.NoError(t, err)
		require.Len(t, answer.GetStats(), 1)
		assert.Positive(t, answer.GetStats()[0].GetMemory().GetUsageBytes().GetValue())
	})
	t.Run("metrics", func(t *testing.T) {
		answer, err := n.CRI().Runtime.ListPodSandboxMetrics(ctx, &runtimeapi.ListPodSandboxMetricsRequest{})
		require.NoError(t, err)
		names := map[string]bool{}
		for _, p := range answer.GetPodMetrics() {
			if p.GetPodSandboxId() != pod.ID {
				continue
			}
			for _, c := range p.GetContainerMetrics() {
				for _, m := range c.GetMetrics() {
					names[m.GetName()] = true
				}
			}
		}
		for _, name := range []string{"container_cpu_usage_seconds_total", "container_memory_usage_bytes"} {
			assert.True(t, names[name], "%s is not among %v", name, names)
		}
	})
	t.Run("pod", func(t *testing.T) {
		answer, err := n.CRI().Runtime.PodSandboxStats(ctx, &runtimeapi.PodSandboxStatsRequest{PodSandboxId: pod.ID})
		require.NoError(t, err)
		linux := answer.GetStats().GetLinux()
		assert.Positive(t, linux.GetCpu().GetUsageCoreNanoSeconds().GetValue())
		assert.Greater(t, linux.GetMemory().GetUsageBytes().GetValue(), uint64(20000000))
		assert.NotEmpty(t, linux.GetContainers())
		assert.NotEmpty(t, linux.GetNetwork().GetDefaultInterface().GetName())
	})
}
