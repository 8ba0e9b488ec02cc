// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"os"
	"testing"

	"github.com/containerd/containerd/api/services/tasks/v1"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cloister-project/cloister/test/harness"
)

// targeting makes a container join another one's pid namespace, as `kubectl debug --target` does.
func targeting(target *harness.Container) func(*runtimeapi.ContainerConfig) {
	return func(c *runtimeapi.ContainerConfig) {
		c.Linux.SecurityContext.NamespaceOptions = &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_TARGET, TargetId: target.ID}
	}
}

// pidOf is the process id that containerd has for a container of CRI's.
func pidOf(t *testing.T, n *harness.Node, c *harness.Container) uint32 {
	t.Helper()
	answer, err := tasksOf(t, n).Get(namespaces.WithNamespace(testContext(t), criNamespace), &tasks.GetRequest{ContainerID: c.ID})
	require.NoError(t, err)
	return answer.GetProcess().GetPid()
}

// checkTarget runs containers in the pid namespace of another one.
func checkTarget(t *testing.T, n *harness.Node, pod *harness.Pod, other *harness.Container) {
	ctx := testContext(t)
	target := runContainer(t, pod, harness.ContainerSpec{
		Script: "echo mine > /mine; trap 'echo got it' USR1; trap 'exit 7' TERM; while :; do sleep 3600 & wait $!; done; : marker-target",
	})
	debugger := runContainer(t, pod, harness.ContainerSpec{Script: idle + "; : marker-debugger", Change: targeting(target)})
	assert.Contains(t, output(t, target, "ps -o args"), "marker-debugger")
	assert.Equal(t, output(t, target, "readlink /proc/self/ns/pid"), output(t, debugger, "readlink /proc/self/ns/pid"))
	assert.Contains(t, output(t, debugger, "ps -o args"), "marker-target")
	assert.Equal(t, "mine", output(t, debugger, "cat /proc/1/root/mine"))
	_, err := debugger.Output(ctx, "cat", "/mine")
	require.Error(t, err, "its root filesystem is its own")
	assert.NotContains(t, output(t, other, "ps -o args"), "marker-target")
	output(t, debugger, "kill -USR1 1")
	require.NoError(t, target.WaitLog(ctx, "got it\n"))

	// What stands for them on the host is there, and nobody else's.
	pids := map[uint32]bool{}
	for _, c := range []*harness.Container{target, debugger, other} {
		pid := pidOf(t, n, c)
		pids[pid] = true
		name, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
		require.NoError(t, err)
		assert.Equal(t, c.ID[:15]+"\n", string(name))
		network, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/net", pid))
		require.NoError(t, err)
		of, err := os.Readlink(podNetwork(t, pod))
		require.NoError(t, err)
		assert.Equal(t, of, network)
	}
	assert.Len(t, pids, 3)

	// The end of one that joined leaves its target alive; the target's takes along who has joined.
	require.NoError(t, debugger.Remove(ctx))
	assert.Equal(t, "alive", output(t, target, "echo alive"))
	assert.NotContains(t, output(t, target, "ps -o args"), "marker-debugger")
	second := runContainer(t, pod, harness.ContainerSpec{Change: targeting(target)})
	killer, err := second.Exec(ctx, "sh", "-c", "kill -TERM 1")
	require.NoError(t, err)
	require.Contains(t, []int32{0, 137}, killer.ExitCode, "it ends with the target, or before")
	status, err := target.Wait(ctx)
	require.NoError(t, err)
	assert.EqualValues(t, 7, status.GetExitCode())
	status, err = second.Wait(ctx)
	require.NoError(t, err)
	assert.EqualValues(t, 137, status.GetExitCode())

	_, err = pod.Create(ctx, harness.ContainerSpec{Script: idle, Change: targeting(target)})
	require.ErrorContains(t, err, "is not running")
	_, err = pod.Create(ctx, harness.ContainerSpec{Script: idle, Change: targeting(&harness.Container{ID: "nobody"})})
	require.ErrorContains(t, err, "does not exist")
}

// podNetwork names the network namespace of a pod by the process id of its sandbox.
func podNetwork(t *testing.T, pod *harness.Pod) string {
	t.Helper()
	_, info, err := pod.Status(testContext(t))
	require.NoError(t, err)
	require.NotEmpty(t, info["pid"], "%v", info)
	return fmt.Sprintf("/proc/%s/ns/net", info["pid"])
}
