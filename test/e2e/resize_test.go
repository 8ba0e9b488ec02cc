// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cloister-project/cloister/test/harness"
)

// TestResize gives a pod that runs more CPUs and memory, as the kubelet does for a resize in place.
func TestResize(t *testing.T) {
	n := sharedNode(t)
	require.NoError(t, n.WriteDropIn("resize", "[sizing]\ngrow_vcpus = 1\ngrow_memory_mib = 512\n"))
	cleanup(t, "the settings", func(context.Context) error { return n.RemoveDropIn("resize") })
	ctx := testContext(t)
	resources := func(memoryMiB, cpus int64) *runtimeapi.LinuxContainerResources {
		return &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: memoryMiB * mib, CpuQuota: cpus * 100_000, CpuPeriod: 100_000}
	}
	pod := runPod(t, n, harness.PodSpec{Change: func(c *runtimeapi.PodSandboxConfig) { c.Linux.Resources = resources(128, 1) }})
	c := runContainer(t, pod, harness.ContainerSpec{Change: limited(resources(64, 1))})
	other := runContainer(t, pod, harness.ContainerSpec{Change: limited(&runtimeapi.LinuxContainerResources{MemoryLimitInBytes: 64 * mib})})
	total := func() int {
		kib, err := strconv.Atoi(strings.Fields(output(t, other, "grep MemTotal /proc/meminfo"))[1])
		require.NoError(t, err)
		return kib >> 10
	}
	update := func(memoryMiB, cpus int64) error {
		_, err := n.CRI().Runtime.UpdateContainerResources(ctx,
			&runtimeapi.UpdateContainerResourcesRequest{ContainerId: c.ID, Linux: resources(memoryMiB, cpus)})
		return err
	}
	before := total()
	assert.Equal(t, "1", output(t, c, "nproc"))

	require.NoError(t, update(400, 2))
	assert.Equal(t, "2", output(t, c, "nproc"))
	assert.Equal(t, "2", output(t, other, "nproc"))
	grown := total()
	assert.Greater(t, grown, before+256, "400 - 64 MiB more are limits")
	assert.Equal(t, "419430400\n200000 100000", output(t, c, "cd /sys/fs/cgroup && cat memory.max cpu.max"))
	assert.Empty(t, output(t, c, "dd if=/dev/zero of=/dev/null bs=300M count=1 2> /dev/null"), "it has them")

	// Less is the container's own limit; the VM keeps what it has.
	require.NoError(t, update(64, 1))
	assert.Equal(t, "67108864\n100000 100000", output(t, c, "cd /sys/fs/cgroup && cat memory.max cpu.max"))
	assert.Equal(t, grown, total())
	require.NoError(t, update(400, 2), "it has been there before")

	// More than there is room for, alone or with the other container's.
	for _, more := range [][2]int64{{2048, 2}, {400, 3}, {600, 2}} {
		require.ErrorContains(t, update(more[0], more[1]), "make the pod anew")
	}
	assert.Equal(t, "419430400\n200000 100000", output(t, c, "cd /sys/fs/cgroup && cat memory.max cpu.max"))
	_, err := n.CRI().Runtime.UpdatePodSandboxResources(ctx, &runtimeapi.UpdatePodSandboxResourcesRequest{
		PodSandboxId: pod.ID, Resources: resources(600, 2),
	})
	require.NoError(t, err)
	assert.Greater(t, total(), grown, "the pod's limits count by themselves")
	_, err = n.CRI().Runtime.UpdatePodSandboxResources(ctx, &runtimeapi.UpdatePodSandboxResourcesRequest{
		PodSandboxId: pod.ID, Resources: resources(64<<10, 2),
	})
	require.ErrorContains(t, err, "make the pod anew")
}
