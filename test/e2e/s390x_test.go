// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cloister-project/cloister/test/harness"
)

const s390xImage = "localhost/cloister/busybox:s390x"

// s390xNode is the shared node with an image for s390x, of two layers.
func s390xNode(t *testing.T) *harness.Node {
	t.Helper()
	n := sharedNode(t)
	a := n.Artifacts()
	if err := a.CheckS390X(); err != nil {
		skipLane(t, err.Error())
	}
	image, err := harness.BusyboxS390X(s390xImage, a.BusyboxS390X, a.Busybox)
	require.NoError(t, err)
	image.Layers = append(image.Layers, []harness.File{
		{Name: "etc/.wh.nsswitch.conf"},
		{Name: "upper", Body: []byte("second layer\n"), Mode: 0o640, UID: 1000, GID: 2000},
	})
	require.NoError(t, n.Import(testContext(t), image))
	return n
}

// TestS390X runs pods in emulated IBM Z guests from a host of another architecture and byte order: containerd, the shim
// and all that the host says are little-endian, the guest's kernel and agent big-endian. It is about the portable parts;
// what a sealed guest adds is TestSecureExecution's.
func TestS390X(t *testing.T) {
	n := s390xNode(t)
	pod := runPod(t, n, harness.PodSpec{Handler: harness.HandlerS390X})
	t.Run("container", func(t *testing.T) { checkForeignContainer(t, pod, s390xImage) })
	t.Run("exit codes", func(t *testing.T) { checkForeignExits(t, pod) })
	t.Run("layers", func(t *testing.T) { checkForeignLayers(t, pod) })
	t.Run("output", func(t *testing.T) { checkForeignOutput(t, pod) })
	t.Run("network", func(t *testing.T) { checkForeignNetwork(t, n, pod) })
	t.Run("volumes", func(t *testing.T) { checkForeignVolumes(t, pod) })
	t.Run("limits", func(t *testing.T) { checkForeignLimits(t, pod) })
	t.Run("seccomp", func(t *testing.T) { checkForeignSeccomp(t, pod) })
	t.Run("wrong architecture", func(t *testing.T) {
		status, _, stderr := ended(t, pod, harness.ContainerSpec{Name: "native", Command: []string{"/bin/busybox", "true"}})
		assert.NotZero(t, status.GetExitCode())
		assert.Contains(t, stderr, "exec format error")
	})
}

// checkForeignContainer takes a container through its life in a guest that is no amd64.
func checkForeignContainer(t *testing.T, pod *harness.Pod, image string) {
	ctx := testContext(t)
	status, _, err := pod.Status(ctx)
	require.NoError(t, err)
	assert.Equal(t, runtimeapi.PodSandboxState_SANDBOX_READY, status.GetState())

	c := runContainer(t, pod, harness.ContainerSpec{Name: "life", Image: image, Script: "echo out; echo err >&2; " + idle})
	require.NoError(t, c.WaitLog(ctx, "out\n"))
	assert.Equal(t, "s390x", output(t, c, "uname -m"))
	assert.Equal(t, pod.Config.GetHostname(), output(t, c, "hostname"))
	hostBootID, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	require.NoError(t, err)
	assert.NotEqual(t, strings.TrimSpace(string(hostBootID)), output(t, c, "cat /proc/sys/kernel/random/boot_id"))
	result, err := c.Exec(ctx, "sh", "-c", "echo o; echo e >&2; exit 3")
	require.NoError(t, err)
	assert.Equal(t, harness.ExecResult{Stdout: "o\n", Stderr: "e\n", ExitCode: 3}, result)

	require.NoError(t, c.Stop(ctx, budget))
	ended, err := c.Wait(ctx)
	require.NoError(t, err)
	assert.Zero(t, ended.GetExitCode(), "it ended by itself at SIGTERM")
	stdout, stderr, err := c.Log()
	require.NoError(t, err)
	assert.Equal(t, []string{"out\n", "err\n"}, []string{stdout, stderr})
}

func checkForeignExits(t *testing.T, pod *harness.Pod) {
	for script, want := range map[string]int32{"exit 42": 42, "sh -c 'kill -9 $$'; exit $?": 128 + 9} {
		status, _, _ := ended(t, pod, harness.ContainerSpec{Image: s390xImage, Script: script})
		assert.Equal(t, want, status.GetExitCode(), script)
	}
}

// checkForeignLayers looks at disks that the host wrote: EROFS images are little-endian everywhere.
func checkForeignLayers(t *testing.T, pod *harness.Pod) {
	c := runContainer(t, pod, harness.ContainerSpec{Image: s390xImage})
	assert.Equal(t, "second layer\n1000:2000 640", output(t, c, "cat /upper; stat -c '%u:%g %a' /upper"))
	assert.Equal(t, "gone", output(t, c, "test -e /etc/nsswitch.conf || echo gone"))
	assert.Equal(t, "mine", output(t, c, "echo mine > /bin/new && cat /bin/new"), "the writable layer")
	again := runContainer(t, pod, harness.ContainerSpec{Image: s390xImage})
	assert.Equal(t, "not mine", output(t, again, "test -e /bin/new || echo not mine"))
}

// checkForeignOutput sends more than any buffer on the way holds, in both directions at once.
func checkForeignOutput(t *testing.T, pod *harness.Pod) {
	const lines, width = 16 << 10, 63 // what the script prints
	status, stdout, _ := ended(t, pod, harness.ContainerSpec{
		Image: s390xImage, Script: "yes 0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ- | head -n 16384",
	})
	assert.Zero(t, status.GetExitCode())
	require.Len(t, stdout, lines*(width+1))
	assert.Equal(t, lines, strings.Count(stdout, "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ-\n"))
}

func checkForeignNetwork(t *testing.T, n *harness.Node, pod *harness.Pod) {
	ctx := testContext(t)
	status, _, err := pod.Status(ctx)
	require.NoError(t, err)
	ip := status.GetNetwork().GetIp()
	server := runContainer(t, pod, harness.ContainerSpec{
		Name: "server", Image: s390xImage, Script: "while :; do echo served | nc -l -p 9000; done & " + idle,
	})
	assert.Contains(t, output(t, server, "ip addr"), ip+"/")

	// From the node, then back to it.
	var got string
	waitFor(t, ctx, "the container listens", func() bool {
		conn, err := n.Dial(ctx, "tcp", net.JoinHostPort(ip, "9000"))
		if err != nil {
			return false
		}
		defer conn.Close()
		b, err := io.ReadAll(conn)
		got = string(b)
		return err == nil && got != ""
	})
	assert.Equal(t, "served\n", got)
	output(t, server, "ping -c 1 -W 30 10.88.0.1")

	// A neighbour of the host's architecture.
	neighbour := runPod(t, n, harness.PodSpec{Handler: harness.HandlerCloister})
	client := runContainer(t, neighbour, harness.ContainerSpec{Name: "client"})
	assert.Equal(t, "served", output(t, client, "until nc "+ip+" 9000 < /dev/null; do usleep 50000; done"))
}

// checkForeignVolumes: these guests have no virtio-fs, so that small volumes are copied, and live directories refused.
func checkForeignVolumes(t *testing.T, pod *harness.Pod) {
	k := newKubeletPod(t, pod)
	config := k.volume("configmap", "settings", map[string]string{"mode": "old"})
	c := runContainer(t, pod, harness.ContainerSpec{
		Name: "volumes", Image: s390xImage, Mounts: []*runtimeapi.Mount{{HostPath: config, ContainerPath: "/settings", Readonly: true}},
	})
	assert.Equal(t, "old", output(t, c, "cat /settings/mode"))
	k.volume("configmap", "settings", map[string]string{"mode": "new"})
	assert.Equal(t, "new", output(t, c, "until grep new /settings/mode; do usleep 50000; done"))

	_, err := pod.Run(testContext(t), harness.ContainerSpec{
		Name: "live", Image: s390xImage, Mounts: []*runtimeapi.Mount{{HostPath: t.TempDir(), ContainerPath: "/live"}},
	})
	require.ErrorContains(t, err, "shares no files with the host")
}

func checkForeignLimits(t *testing.T, pod *harness.Pod) {
	c := runContainer(t, pod, harness.ContainerSpec{
		Name: "limited", Image: s390xImage,
		Change: func(c *runtimeapi.ContainerConfig) {
			c.Linux.Resources = &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: 64 << 20, CpuPeriod: 100000, CpuQuota: 50000}
		},
	})
	assert.Equal(t, "67108864\n50000 100000", output(t, c, "cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/cpu.max"))
	stats, err := c.Stats(testContext(t))
	require.NoError(t, err)
	assert.NotZero(t, stats.GetMemory().GetWorkingSetBytes().GetValue())
	assert.NotZero(t, stats.GetCpu().GetUsageCoreNanoSeconds().GetValue())

	status, _, _ := ended(t, pod, harness.ContainerSpec{
		Name: "greedy", Image: s390xImage, Script: "exec dd if=/dev/zero of=/dev/null bs=96M count=1",
		Change: func(c *runtimeapi.ContainerConfig) {
			c.Linux.Resources = &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: 32 << 20}
		},
	})
	assert.Equal(t, "OOMKilled", status.GetReason())
}

// checkForeignSeccomp has the guest compile a profile for its own system calls. The profile names the architecture:
// containerd's built-in one is for the architecture of the host.
func checkForeignSeccomp(t *testing.T, pod *harness.Pod) {
	profile := filepath.Join(t.TempDir(), "profile.json")
	require.NoError(t, os.WriteFile(profile, []byte(`{"defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_S390X"],
		"syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 95}]}`), 0o600))
	c := runContainer(t, pod, harness.ContainerSpec{Name: "filtered", Image: s390xImage,
		Change: secured(func(s *runtimeapi.LinuxContainerSecurityContext) {
			s.Seccomp = &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_Localhost, LocalhostRef: profile}
		})})
	result, err := c.Exec(testContext(t), "mkdir", "/forbidden")
	require.NoError(t, err)
	assert.NotZero(t, result.ExitCode)
	assert.Contains(t, result.Stderr, "Operation not supported")
	assert.Equal(t, map[string]string{"Seccomp": "2"}, statusOf(t, c, "Seccomp"))
}
