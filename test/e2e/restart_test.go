// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"os"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sync/errgroup"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cloister-project/cloister/test/harness"
)

// TestContainerdRestart ends containerd in the middle of stdio, in order and by SIGKILL, and starts it again: pods,
// containers and their bytes go on as if nothing had been.
func TestContainerdRestart(t *testing.T) {
	n := harness.ForTest(t, harness.Options{DropIn: os.Getenv("CLOISTER_E2E_DROPIN")})
	handlers := []string{harness.HandlerCloister, harness.HandlerClassic}
	var (
		pods     []*harness.Pod
		counters []*harness.Container
	)
	for _, handler := range handlers {
		pod := runPod(t, n, harness.PodSpec{Handler: handler})
		pods = append(pods, pod)
		counters = append(counters, runContainer(t, pod, harness.ContainerSpec{
			Script: "trap 'exit 0' TERM; i=0; while :; do i=$((i+1)); echo line $i; usleep 10000; done",
		}))
	}
	for _, c := range counters {
		require.NoError(t, c.WaitLog(testContext(t), "line 10\n"))
	}
	// 20 MiB go through this one while containerd is away and comes back, twice.
	p := newProcess(t, n, counters[0].ID, processSpec{script: "cat; echo done >&2; exit 42"})
	data := randomBytes(bulkSize)
	part := len(data) / 3

	feed := func(from, to int) *errgroup.Group {
		var g errgroup.Group
		g.Go(func() error {
			_, err := p.stdin.Write(data[from:to])
			return err
		})
		return &g
	}
	for i, hard := range []bool{true, false} {
		t.Run(map[bool]string{true: "killed", false: "in order"}[hard], func(t *testing.T) {
			ctx := testContext(t)
			writing := feed(i*part, (i+1)*part)
			require.NoError(t, n.StopContainerd(ctx, hard))
			require.NoError(t, writing.Wait(), "nobody of containerd is needed for it")
			require.NoError(t, n.StartContainerd(ctx))
			for j, c := range counters {
				checkAlive(t, n, handlers[j], pods[j], c)
			}
		})
	}
	require.NoError(t, feed(2*part, len(data)).Wait())
	p.closeStdin()
	stdout, stderr, status := p.finished()
	assert.EqualValues(t, 42, status)
	assert.Equal(t, "done\n", string(stderr))
	assert.Len(t, stdout, bulkSize)
	assert.Equal(t, sum(data), sum(stdout))

	for i, c := range counters {
		t.Run("end of "+handlers[i], func(t *testing.T) {
			ctx := testContext(t)
			require.NoError(t, c.Stop(ctx, budget))
			ended, err := c.Wait(ctx)
			require.NoError(t, err)
			assert.Zero(t, ended.GetExitCode())
			require.NoError(t, c.Remove(ctx))
			require.NoError(t, pods[i].Remove(ctx))
		})
	}
}

// checkAlive looks for a container that ran when containerd was away.
func checkAlive(t *testing.T, n *harness.Node, handler string, pod *harness.Pod, c *harness.Container) {
	t.Helper()
	ctx := testContext(t)
	status, _, err := pod.Status(ctx)
	require.NoError(t, err)
	assert.Equal(t, runtimeapi.PodSandboxState_SANDBOX_READY, status.GetState(), handler)
	list, err := n.CRI().Runtime.ListContainers(ctx, &runtimeapi.ListContainersRequest{
		Filter: &runtimeapi.ContainerFilter{Id: c.ID, State: &runtimeapi.ContainerStateValue{State: runtimeapi.ContainerState_CONTAINER_RUNNING}},
	})
	require.NoError(t, err)
	assert.Len(t, list.GetContainers(), 1, handler)

	// Its output goes on from where it was: what comes now is later than what was there.
	last := lastCount(t, c)
	waitFor(t, ctx, "the output of "+handler+" goes on", func() bool { return lastCount(t, c) > last })
	assert.Equal(t, "alive", output(t, c, "echo alive"), handler)
	debugger := runContainer(t, pod, harness.ContainerSpec{Change: targeting(c)})
	assert.Contains(t, output(t, debugger, "cat /proc/1/cmdline"), "echo line $i", handler)
	again := runContainer(t, pod, harness.ContainerSpec{Script: "echo new; exit 3"})
	ended, err := again.Wait(ctx)
	require.NoError(t, err)
	assert.EqualValues(t, 3, ended.GetExitCode(), handler)
}

// lastCount is the number in the last line of a counter's log.
func lastCount(t *testing.T, c *harness.Container) int {
	t.Helper()
	stdout, _, err := c.Log()
	require.NoError(t, err)
	lines := strings.Split(strings.TrimSuffix(stdout, "\n"), "\n")
	count, err := strconv.Atoi(strings.TrimPrefix(lines[len(lines)-1], "line "))
	require.NoError(t, err, lines[len(lines)-1])
	return count
}
