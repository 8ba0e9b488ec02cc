// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cloister-project/cloister/test/harness"
)

const (
	deepImage  = "localhost/cloister/deep:100"
	deepLayers = 100
	emptyImage = "localhost/cloister/empty:latest"
)

// importImages imports the images of 100 and of no layers.
func importImages(t *testing.T, n *harness.Node) {
	t.Helper()
	deep, err := harness.Deep(deepImage, n.Artifacts().Busybox, deepLayers)
	require.NoError(t, err)
	require.NoError(t, n.Import(testContext(t), deep, harness.Empty(emptyImage)))
}

// TestHandlers runs a pod with each of the ways in which CRI uses Cloister: the shim as sandboxer with both
// snapshotters, and containerd's own sandboxer with its pause container.
func TestHandlers(t *testing.T) {
	n := sharedNode(t)
	importImages(t, n)
	for _, handler := range []string{harness.HandlerCloister, harness.HandlerErofs, harness.HandlerClassic} {
		t.Run(handler, func(t *testing.T) {
			assert.True(t, features(t, n, handler).GetRecursiveReadOnlyMounts(), "the kubelet refuses such pods else")
			pod := runPod(t, n, harness.PodSpec{Handler: handler})
			t.Run("pod", func(t *testing.T) { checkPod(t, pod) })
			t.Run("container", func(t *testing.T) { checkContainer(t, pod) })
			t.Run("100 layers", func(t *testing.T) { checkDeep(t, pod) })
			t.Run("no layers", func(t *testing.T) { checkEmpty(t, n, pod) })
		})
	}
}

// features are what containerd tells the kubelet of a handler.
func features(t *testing.T, n *harness.Node, handler string) *runtimeapi.RuntimeHandlerFeatures {
	t.Helper()
	answer, err := n.CRI().Runtime.Status(testContext(t), &runtimeapi.StatusRequest{})
	require.NoError(t, err)
	for _, h := range answer.GetRuntimeHandlers() {
		if h.GetName() == handler {
			return h.GetFeatures()
		}
	}
	require.FailNow(t, "containerd has no handler "+handler)
	return nil
}

func checkPod(t *testing.T, pod *harness.Pod) {
	status, _, err := pod.Status(testContext(t))
	require.NoError(t, err)
	assert.Equal(t, runtimeapi.PodSandboxState_SANDBOX_READY, status.GetState())
	assert.NotZero(t, status.GetCreatedAt())
	assert.True(t, strings.HasPrefix(status.GetNetwork().GetIp(), "10.88."), status.GetNetwork())
	require.Len(t, status.GetNetwork().GetAdditionalIps(), 1)

	c := runContainer(t, pod, harness.ContainerSpec{})
	bootID, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	require.NoError(t, err)
	assert.NotEqual(t, strings.TrimSpace(string(bootID)), output(t, c, "cat /proc/sys/kernel/random/boot_id"), "this is the host's kernel")
	// As containerd's CRI plugin has it for runc, in either mode.
	assert.Equal(t, "0\n0\t2147483647", output(t, c, "cd /proc/sys/net/ipv4; cat ip_unprivileged_port_start ping_group_range"))
	addresses := output(t, c, "ip addr")
	assert.Contains(t, addresses, status.GetNetwork().GetIp()+"/")
	assert.Contains(t, addresses, status.GetNetwork().GetAdditionalIps()[0].GetIp()+"/")
}

// checkContainer takes a container through its life: output, exec, a stop that it obeys, a new one in its place.
func checkContainer(t *testing.T, pod *harness.Pod) {
	ctx := testContext(t)
	for i := range 2 {
		c, err := pod.Run(ctx, harness.ContainerSpec{Name: "again", Script: "echo out; echo err >&2; " + idle,
			Change: logNamed("again-" + itoa(int64(i)))})
		require.NoError(t, err)
		cleanup(t, "removing the container", c.Remove)
		require.NoError(t, c.WaitLog(ctx, "out\n"))
		result, err := c.Exec(ctx, "sh", "-c", "echo o; echo e >&2; exit 3")
		require.NoError(t, err)
		assert.Equal(t, harness.ExecResult{Stdout: "o\n", Stderr: "e\n", ExitCode: 3}, result)

		status, err := c.Status(ctx)
		require.NoError(t, err)
		assert.Equal(t, runtimeapi.ContainerState_CONTAINER_RUNNING, status.GetState())
		require.NoError(t, c.Stop(ctx, budget))
		status, err = c.Wait(ctx)
		require.NoError(t, err)
		assert.Zero(t, status.GetExitCode(), "it ended by itself at SIGTERM")
		assert.Equal(t, "Completed", status.GetReason())
		stdout, stderr, err := c.Log()
		require.NoError(t, err)
		assert.Equal(t, []string{"out\n", "err\n"}, []string{stdout, stderr})
		require.NoError(t, c.Remove(ctx))
	}
}

// logNamed gives a container a log of its own, as kubelet does with each attempt: CRI appends to what is there.
func logNamed(name string) func(*runtimeapi.ContainerConfig) {
	return func(c *runtimeapi.ContainerConfig) { c.LogPath = name + ".log" }
}

// deepScript prints what an image made by harness.Deep shows: the file that each layer replaces, the lowest and the
// highest layer's own files, how many there are, and which of the files is left that each layer but the last removes.
const deepScript = "cat /top /layers/1 /layers/99; ls /layers | wc -l; ls -d /layers/gone-*; cat /etc/os-release | head -n1"

const deepOutput = "99\n1\n99\n100\n/layers/gone-99\nID=cloister-test\n"

func checkDeep(t *testing.T, pod *harness.Pod) {
	for range 2 { // the second one finds everything in the cache
		status, stdout, stderr := ended(t, pod, harness.ContainerSpec{Image: deepImage, Script: deepScript})
		assert.Equal(t, deepOutput, stdout)
		assert.Empty(t, stderr)
		assert.Zero(t, status.GetExitCode())
	}
}

// checkEmpty runs what a mount brings into an image that has nothing, and fails to run what the image has not.
func checkEmpty(t *testing.T, n *harness.Node, pod *harness.Pod) {
	tools := t.TempDir()
	binary, err := os.ReadFile(n.Artifacts().Busybox)
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(filepath.Join(tools, "busybox"), binary, 0o755))
	status, stdout, _ := ended(t, pod, harness.ContainerSpec{
		Image: emptyImage,
		Command: []string{"/tools/busybox", "sh", "-c", "cd /; for f in *; do echo $f; done; echo x > /new && busybox=/tools/busybox && " +
			"$busybox cat /new"},
		Mounts: []*runtimeapi.Mount{{HostPath: tools, ContainerPath: "/tools", Readonly: true}},
	})
	assert.Zero(t, status.GetExitCode())
	assert.Equal(t, "dev\netc\nproc\nsys\ntools\nx\n", stdout)

	_, err = pod.Run(testContext(t), harness.ContainerSpec{Image: emptyImage})
	require.Error(t, err)
	assert.ErrorContains(t, err, `exec: "/nothing": stat /nothing: no such file or directory`)
}
