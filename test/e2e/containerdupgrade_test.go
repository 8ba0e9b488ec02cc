// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/cloister-project/cloister/test/harness"
)

const runContainerd = "/run/containerd"

// TestContainerdUpgrade begins with the containerd that Debian packages (2.1, where the pins of tools/setup still hold), which runs pods in
// both modes as the newer one does, and replaces it by the newer one while pods run.
func TestContainerdUpgrade(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	dir, err := harness.SetupValue("CLOISTER_DEBIAN_CONTAINERD")
	if err != nil && os.Getenv("CLOISTER_E2E") != "required" {
		t.Skipf("cannot run here: %v", err)
	}
	require.NoError(t, err)
	older := containerdVersion(t, dir)
	// Its shims' sockets cannot be elsewhere.
	for _, dir := range []string{runContainerd, filepath.Join(runContainerd, "s")} {
		if _, err := os.Stat(dir); os.IsNotExist(err) {
			t.Cleanup(func() { require.NoError(t, os.Remove(dir), "what is still in it?") })
		}
	}
	n := harness.ForTest(t, harness.Options{DropIn: os.Getenv("CLOISTER_E2E_DROPIN"), Containerd: dir,
		Handlers: []string{harness.HandlerCloister, harness.HandlerClassic}})
	newer := containerdVersion(t, n.Artifacts().Conformance)
	t.Logf("containerd %s, then %s", older, newer)
	require.NotEqual(t, older, newer)

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
		t.Run(older+" "+handler, func(t *testing.T) {
			checkPod(t, pod)
			checkContainer(t, pod)
			stats, err := counters[len(counters)-1].Stats(testContext(t))
			require.NoError(t, err)
			assert.NotZero(t, stats.GetMemory().GetWorkingSetBytes().GetValue())
		})
	}

	require.NoError(t, n.StopContainerd(testContext(t), false))
	require.NoError(t, n.UseContainerd(""))
	require.NoError(t, n.StartContainerd(testContext(t)))
	for i, c := range counters {
		t.Run(newer+" "+handlers[i], func(t *testing.T) {
			ctx := testContext(t)
			checkAlive(t, n, handlers[i], pods[i], c)
			require.NoError(t, c.Stop(ctx, budget))
			ended, err := c.Wait(ctx)
			require.NoError(t, err)
			assert.Zero(t, ended.GetExitCode())
			require.NoError(t, c.Remove(ctx))
			require.NoError(t, pods[i].Remove(ctx))
		})
	}
	t.Run("a new pod", func(t *testing.T) { checkPod(t, runPod(t, n, harness.PodSpec{})) })
}

// containerdVersion is as "2.1.9".
func containerdVersion(t *testing.T, dir string) string {
	t.Helper()
	out, err := exec.CommandContext(testContext(t), filepath.Join(dir, "containerd"), "--version").Output()
	require.NoError(t, err)
	fields := strings.Fields(string(out))
	require.GreaterOrEqual(t, len(fields), 3, string(out))
	version, _, _ := strings.Cut(strings.TrimPrefix(fields[2], "v"), "~")
	return version
}
