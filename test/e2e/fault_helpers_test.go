// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"github.com/u-root/u-root/pkg/cpio"
	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cloister-project/cloister/test/harness"
)

// statusKilled is the exit status of what SIGKILL ended, or what went with its VM.
const statusKilled = 128 + 9

// requireNothingLeft looks for anything left now, before a test goes on.
func requireNothingLeft(t *testing.T, n *harness.Node) {
	t.Helper()
	leaks, err := n.Leaks(testContext(t))
	require.NoError(t, err)
	require.Empty(t, leaks, "left behind")
}

// withSettings lays text over the node's cloister.toml until the test's end.
func withSettings(t *testing.T, n *harness.Node, text string) {
	t.Helper()
	require.NoError(t, n.WriteDropIn("60-fault", text))
	t.Cleanup(func() { assert.NoError(t, n.RemoveDropIn("60-fault")) })
}

// requireContains wants all the words in the text.
func requireContains(t *testing.T, text string, want ...string) {
	t.Helper()
	for _, w := range want {
		assert.Contains(t, text, w)
	}
	if t.Failed() {
		t.FailNow()
	}
}

// requireNoPod makes a pod, which must fail with an error that has all the words, and leave nothing.
func requireNoPod(t *testing.T, n *harness.Node, spec harness.PodSpec, want ...string) {
	t.Helper()
	if spec.Handler == "" {
		spec.Handler = harness.HandlerCloister
	}
	ctx := testContext(t)
	pod, err := n.CRI().RunPod(ctx, spec)
	if err == nil {
		require.NoError(t, pod.Remove(ctx))
	}
	require.Error(t, err)
	t.Logf("the error: %v", err)
	requireContains(t, err.Error(), want...)
	requireNothingLeft(t, n)
}

// processOf is the node's only process with such an executable.
func processOf(t *testing.T, n *harness.Node, prefix string) int {
	t.Helper()
	pids, err := n.Pids(prefix)
	require.NoError(t, err)
	require.Len(t, pids, 1, "processes of %s", prefix)
	return pids[0]
}

// killOne kills the node's only process with such an executable.
func killOne(t *testing.T, n *harness.Node, prefix string) {
	t.Helper()
	require.NoError(t, unix.Kill(processOf(t, n, prefix), unix.SIGKILL))
}

// requireKilled waits until the container is reported as exited, as if by SIGKILL.
func requireKilled(t *testing.T, c *harness.Container) {
	t.Helper()
	status, err := c.Wait(testContext(t))
	require.NoError(t, err)
	assert.EqualValues(t, statusKilled, status.GetExitCode(), "%s: %s", status.GetReason(), status.GetMessage())
}

// requireNotReady waits until the pod is reported as not ready.
func requireNotReady(t *testing.T, pod *harness.Pod) {
	t.Helper()
	ctx := testContext(t)
	waitFor(t, ctx, "the pod is not ready", func() bool {
		status, _, err := pod.Status(ctx)
		require.NoError(t, err)
		return status.GetState() == runtimeapi.PodSandboxState_SANDBOX_NOTREADY
	})
}

// requireLost waits until the pod is reported as not ready, and its shim tells why, in words with all of these.
func requireLost(t *testing.T, pod *harness.Pod, want ...string) {
	t.Helper()
	requireNotReady(t, pod)
	ctx := testContext(t)
	var reason string
	waitFor(t, ctx, "the shim tells why the pod ended", func() bool {
		_, info, err := pod.Status(ctx)
		require.NoError(t, err)
		reason = info["error"]
		return reason != ""
	})
	requireContains(t, reason, want...)
}

// removeAll removes the pod and looks for what it left.
func removeAll(t *testing.T, n *harness.Node, pod *harness.Pod) {
	t.Helper()
	require.NoError(t, pod.Remove(testContext(t)))
	requireNothingLeft(t, n)
}

// privilegedPod and privilegedContainer let a container write to /proc/sysrq-trigger.
func privilegedPod(c *runtimeapi.PodSandboxConfig) { c.Linux.SecurityContext.Privileged = true }

func privilegedContainer(c *runtimeapi.ContainerConfig) { c.Linux.SecurityContext.Privileged = true }

// faultyInitrd makes an initrd with testdata/faultyagent in the agent's place. It is removed with the node.
func faultyInitrd(t *testing.T, n *harness.Node) string {
	t.Helper()
	ctx := testContext(t)
	program := filepath.Join(n.Dir, "faultyagent")
	build := exec.CommandContext(ctx, "go", "build", "-trimpath", "-buildvcs=false", "-tags", "seccomp netgo osusergo",
		"-ldflags", "-s -w -linkmode external -extldflags -static", "-o", program, "./testdata/faultyagent")
	build.Env = append(os.Environ(), "CGO_ENABLED=1")
	out, err := build.CombinedOutput()
	require.NoError(t, err, string(out))
	agent, err := os.ReadFile(program)
	require.NoError(t, err)
	image, err := os.ReadFile(n.Artifacts().Initrd)
	require.NoError(t, err)

	// The kernel unpacks archives that stand behind each other; a later file takes the place of an earlier one.
	over := bytes.NewBuffer(image)
	for over.Len()%4 != 0 {
		over.WriteByte(0)
	}
	w := cpio.Newc.Writer(over)
	require.NoError(t, w.WriteRecord(cpio.StaticRecord(agent, cpio.Info{Ino: 1, NLink: 1, Name: "init", Mode: cpio.S_IFREG | 0o555})))
	require.NoError(t, cpio.WriteTrailer(w))
	path := filepath.Join(n.Dir, "faulty.img")
	require.NoError(t, os.WriteFile(path, over.Bytes(), 0o600))
	return path
}

// mountTmpfs mounts a file system in memory in the node's directory until the test's end.
func mountTmpfs(t *testing.T, n *harness.Node, name, options string) (path string, unmount func()) {
	t.Helper()
	path = filepath.Join(n.Dir, name)
	require.NoError(t, os.MkdirAll(path, 0o700))
	require.NoError(t, unix.Mount("tmpfs", path, "tmpfs", 0, options))
	mounted := true
	unmount = func() {
		if mounted {
			mounted = false
			assert.NoError(t, unix.Unmount(path, 0))
		}
	}
	t.Cleanup(unmount)
	return path, unmount
}

// shimDelete runs `containerd-shim-cloister-v2 delete` by hand, as containerd does for a shim that is gone.
func shimDelete(ctx context.Context, n *harness.Node, namespace, id, bundle string) *exec.Cmd {
	cmd := n.Command(ctx, n.Artifacts().Shim(), "-namespace", namespace, "-id", id, "-bundle", bundle,
		"-address", n.Socket, "-publish-binary", filepath.Join(n.Artifacts().Conformance, "containerd"), "delete")
	cmd.Dir = bundle
	return cmd
}
