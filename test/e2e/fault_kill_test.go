// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bufio"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cloister-project/cloister/test/harness"
)

// QEMU is killed while containers run and while the output of an exec streams.
func TestQEMUIsKilled(t *testing.T) {
	n := sharedNode(t)
	ctx := testContext(t)
	pod := runPod(t, n, harness.PodSpec{})
	one := runContainer(t, pod, harness.ContainerSpec{})
	two := runContainer(t, pod, harness.ContainerSpec{})

	exec := n.Crictl(ctx, "exec", one.ID, "sh", "-c", "while :; do echo streaming; done")
	stdout, err := exec.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, exec.Start())
	line, err := bufio.NewReader(stdout).ReadString('\n')
	require.NoError(t, err)
	require.Equal(t, "streaming\n", line)
	killOne(t, n, "qemu-system")
	_, err = io.Copy(io.Discard, stdout)
	require.NoError(t, err)
	require.Error(t, exec.Wait(), "an exec whose VM was lost has not succeeded")

	requireKilled(t, one)
	requireKilled(t, two)
	requireLost(t, pod, "QEMU was killed by signal 9")
	_, err = one.Exec(ctx, "true")
	require.Error(t, err)
	removeAll(t, n, pod)
}

// The shim is killed: containerd runs `delete`, and everything of the pod goes with it.
func TestShimIsKilled(t *testing.T) {
	n := sharedNode(t)
	pod := runPod(t, n, harness.PodSpec{})
	c := runContainer(t, pod, harness.ContainerSpec{Mounts: []*runtimeapi.Mount{{HostPath: t.TempDir(), ContainerPath: "/shared"}}})
	killOne(t, n, "containerd-shim-cloister")
	status, err := c.Wait(testContext(t))
	require.NoError(t, err)
	// containerd does not wait for what `delete` tells (137): a broken connection alone is "unknown" to it.
	assert.Contains(t, []int32{statusKilled, 255}, status.GetExitCode())
	requireNotReady(t, pod)
	removeAll(t, n, pod)
}

// containerd and the shim are both killed. What containerd does when it comes back is done by hand before: `delete`,
// twice, from what is on disk.
func TestShimAndContainerdAreKilled(t *testing.T) {
	n := sharedNode(t)
	ctx := testContext(t)
	pod := runPod(t, n, harness.PodSpec{})
	c := runContainer(t, pod, harness.ContainerSpec{})
	require.NoError(t, n.StopContainerd(ctx, true))
	killOne(t, n, "containerd-shim-cloister")
	bundle := filepath.Join(n.State, "io.containerd.sandbox.controller.v1.shim", "k8s.io", pod.ID)
	require.DirExists(t, bundle)
	for range 2 {
		succeed(t, shimDelete(ctx, n, "k8s.io", pod.ID, bundle))
		for _, gone := range []string{"qemu-system", "containerd-shim-cloister"} {
			pids, err := n.Pids(gone)
			require.NoError(t, err)
			assert.Empty(t, pids, gone)
		}
		left, err := filepath.Glob(filepath.Join(n.CloisterState, "*"))
		require.NoError(t, err)
		assert.Empty(t, left)
	}
	require.NoError(t, n.StartContainerd(ctx))
	status, err := c.Wait(ctx)
	require.NoError(t, err)
	assert.NotZero(t, status.GetExitCode())
	requireNotReady(t, pod)
	removeAll(t, n, pod)
}

// virtiofsd is killed: what the guest reads from the host's directory can never be answered, so the pod ends.
func TestVirtiofsdIsKilled(t *testing.T) {
	n := sharedNode(t)
	ctx := testContext(t)
	dir := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(dir, "file"), []byte("live"), 0o644))
	pod := runPod(t, n, harness.PodSpec{})
	c := runContainer(t, pod, harness.ContainerSpec{Mounts: []*runtimeapi.Mount{{HostPath: dir, ContainerPath: "/shared"}}})
	got, err := c.Output(ctx, "cat", "/shared/file")
	require.NoError(t, err)
	require.Equal(t, "live", got)
	pids, err := n.Pids("virtiofsd")
	require.NoError(t, err)
	require.NotEmpty(t, pids)
	for _, pid := range pids {
		require.NoError(t, unix.Kill(pid, unix.SIGKILL))
	}
	requireKilled(t, c)
	requireLost(t, pod, "virtiofsd")
	removeAll(t, n, pod)
}

// containerd is killed and comes back in the middle of a container's output: none of it is lost or doubled, and input
// that is given afterwards arrives.
func TestContainerdIsRestarted(t *testing.T) {
	n := sharedNode(t)
	ctx := testContext(t)
	pod := runPod(t, n, harness.PodSpec{})
	// A line for each one that the test puts into the file, so that nothing here is a matter of time.
	c := runContainer(t, pod, harness.ContainerSpec{
		Script: "mkfifo /in; echo ready; while :; do while read -r line; do echo \"got $line\"; [ \"$line\" != end ] || exit 7; done < /in; done",
	})
	say := func(line string) {
		_, err := c.Output(ctx, "sh", "-c", "echo "+line+" > /in")
		require.NoError(t, err)
	}
	require.NoError(t, c.WaitLog(ctx, "ready\n"))
	say("before")
	require.NoError(t, c.WaitLog(ctx, "got before\n"))
	require.NoError(t, n.StopContainerd(ctx, true))
	require.NoError(t, n.StartContainerd(ctx))
	status, err := c.Status(ctx)
	require.NoError(t, err)
	require.Equal(t, runtimeapi.ContainerState_CONTAINER_RUNNING, status.GetState())
	say("after")
	require.NoError(t, c.WaitLog(ctx, "got after\n"))
	// No say: the container's end may kill this exec before it has ended by itself.
	_, _ = c.Output(ctx, "sh", "-c", "echo end > /in")
	status, err = c.Wait(ctx)
	require.NoError(t, err)
	assert.EqualValues(t, 7, status.GetExitCode())
	stdout, _, err := c.Log()
	require.NoError(t, err)
	assert.Equal(t, "ready\ngot before\ngot after\ngot end\n", stdout)

	// Nor does one end that writes all the time: what it writes while nobody reads waits in the pipes.
	counter := runContainer(t, pod, harness.ContainerSpec{Script: "i=0; while [ $i -lt 20000 ]; do echo $i; i=$((i+1)); done; exit 3"})
	require.NoError(t, n.StopContainerd(ctx, true))
	require.NoError(t, n.StartContainerd(ctx))
	status, err = counter.Wait(ctx)
	require.NoError(t, err)
	assert.EqualValues(t, 3, status.GetExitCode())
	stdout, _, err = counter.Log()
	require.NoError(t, err)
	lines := strings.Fields(stdout)
	if assert.NotEmpty(t, lines) {
		assert.Equal(t, "19999", lines[len(lines)-1], "the end is there")
	}

	// A process that ignores SIGTERM is killed when its grace is over.
	stubborn := runContainer(t, pod, harness.ContainerSpec{Script: "trap 'echo ignored' TERM; echo trapped; while :; do sleep 3600 & wait " +
		"$!; done"})
	require.NoError(t, stubborn.WaitLog(ctx, "trapped\n"))
	require.NoError(t, stubborn.Stop(ctx, time.Second))
	requireKilled(t, stubborn)
	require.NoError(t, stubborn.WaitLog(ctx, "ignored\n"))
	// A removal that is repeated does no harm, and a pod with such a process is not held up.
	require.NoError(t, stubborn.Remove(ctx))
	require.NoError(t, stubborn.Remove(ctx))
	left := runContainer(t, pod, harness.ContainerSpec{Script: "trap '' TERM; echo trapped; while :; do sleep 3600; done"})
	require.NoError(t, left.WaitLog(ctx, "trapped\n"))
	require.NoError(t, pod.Stop(ctx))
	requireKilled(t, left)
	require.NoError(t, pod.Stop(ctx))
	require.NoError(t, pod.Remove(ctx))
	removeAll(t, n, pod)
}
