// SPDX-License-Identifier: Apache-2.0

package harness

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cloister-project/cloister/internal/procid"
)

// The harness itself is tried with runc: what fails then is the harness's fault, not Cloister's.
func TestNodeWithRunc(t *testing.T) {
	n := ForTest(t, Options{Handlers: []string{HandlerRunc}})
	ctx := t.Context()

	pod, err := n.CRI().RunPod(ctx, PodSpec{Handler: HandlerRunc})
	require.NoError(t, err)
	status, _, err := pod.Status(ctx)
	require.NoError(t, err)
	assert.Equal(t, runtimeapi.PodSandboxState_SANDBOX_READY, status.GetState())
	assert.True(t, strings.HasPrefix(status.GetNetwork().GetIp(), "10.88."), status.GetNetwork())
	assert.NotEmpty(t, status.GetNetwork().GetAdditionalIps(), "an IPv6 address is wanted too")

	web, err := pod.Run(ctx, ContainerSpec{Name: "web", Script: "echo hello; echo oops >&2; exec sleep 1000"})
	require.NoError(t, err)
	require.NoError(t, web.WaitLog(ctx, "hello\n"))
	got, err := web.Output(ctx, "hostname")
	require.NoError(t, err)
	assert.Equal(t, pod.Config.GetHostname(), got)
	result, err := web.Exec(ctx, "sh", "-c", "echo out; echo err >&2; exit 3")
	require.NoError(t, err)
	assert.Equal(t, ExecResult{"out\n", "err\n", 3}, result)

	// containerd goes and comes back, the container lives on.
	require.NoError(t, n.StopContainerd(ctx, true))
	require.NoError(t, n.StartContainerd(ctx))
	got, err = web.Output(ctx, "echo", "still here")
	require.NoError(t, err)
	assert.Equal(t, "still here", got)

	short, err := pod.Run(ctx, ContainerSpec{Script: "exit 7"})
	require.NoError(t, err)
	ended, err := short.Wait(ctx)
	require.NoError(t, err)
	assert.EqualValues(t, 7, ended.GetExitCode())

	// While the pod is there, it shows.
	brief, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	leaks, err := n.Leaks(brief)
	require.NoError(t, err)
	for _, kind := range []string{"process", "link", "mount", "cgroup", "directory", "file"} {
		assert.True(t, hasKind(leaks, kind), "%s not seen in %v", kind, leaks)
	}
	require.NoError(t, pod.Remove(ctx))
}

func TestTools(t *testing.T) {
	n := ForTest(t, Options{Handlers: []string{HandlerRunc}})
	ctx := t.Context()
	deep, err := Deep("localhost/cloister/deep:20", n.Artifacts().Busybox, 20)
	require.NoError(t, err)
	require.NoError(t, n.Import(ctx, deep))

	for _, snapshotter := range []string{"overlayfs", "erofs"} {
		out, err := n.Ctr(ctx, "run", "--rm", "--snapshotter", snapshotter, "--runc-binary", filepath.Join(n.Artifacts().Conformance, "runc"),
			deep.Name, "one-"+snapshotter,
			"sh", "-c", "cat /top; ls /layers | wc -l").Output()
		require.NoError(t, err, n.LogTail(20))
		// 19 numbered files and the last gone-file.
		assert.Equal(t, "19\n20\n", string(out), snapshotter)
	}
	out, err := n.Crictl(ctx, "info").CombinedOutput()
	require.NoError(t, err, string(out))
	out, err = n.Nerdctl(ctx, "run", "--rm", "--runtime", "io.containerd.runc.v2", "--network", n.Name, BusyboxImage, "ip",
		"addr").CombinedOutput()
	require.NoError(t, err, string(out))
	assert.Contains(t, string(out), "10.88.")
}

func TestStopLeavesNothing(t *testing.T) {
	n := ForTest(t, Options{Handlers: []string{HandlerRunc}})
	ctx := t.Context()
	pod, err := n.CRI().RunPod(ctx, PodSpec{Handler: HandlerRunc})
	require.NoError(t, err)
	_, err = pod.Run(ctx, ContainerSpec{Script: "exec sleep 1000"})
	require.NoError(t, err)
	// A running pod must not keep a node from being stopped.
	require.NoError(t, n.Stop(ctx))
	// And again; that nothing is left is looked at by ForTest.
	require.NoError(t, n.Stop(ctx))
}

func TestKeptNodeIsFoundAndStopped(t *testing.T) {
	n := ForTest(t, Options{Handlers: []string{HandlerRunc}})
	ctx := t.Context()
	named := func() *Node {
		nodes, err := Registered()
		require.NoError(t, err)
		for _, other := range nodes {
			if other.Name == n.Name {
				return other
			}
		}
		return nil
	}
	require.Nil(t, named(), "its owner is alive")
	pod, err := n.CRI().RunPod(ctx, PodSpec{Handler: HandlerRunc})
	require.NoError(t, err)
	_, err = pod.Run(ctx, ContainerSpec{Script: "exec sleep 1000"})
	require.NoError(t, err)
	require.NoError(t, n.Keep())
	kept := named()
	require.NotNil(t, kept)
	require.NoError(t, kept.Stop(ctx))
	require.Nil(t, named())
	require.NoError(t, n.Stop(ctx))
}

func TestStartFails(t *testing.T) {
	_, err := Start(t.Context(), Options{Artifacts: Artifacts{Repository: "/nowhere", Cache: t.TempDir(), Conformance: "/nowhere",
		QEMU: "/nowhere", MkfsErofs: "/nowhere", Busybox: "/nowhere"}})
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	require.ErrorIs(t, err, os.ErrNotExist)
	assert.ErrorContains(t, err, "make peers")
	assert.ErrorContains(t, err, "make setup")
}

func TestArchiveIsReproducible(t *testing.T) {
	im := &Image{Name: "localhost/a:b", Layers: [][]File{{{Name: "d", Dir: true}, {Name: "d/f", Body: []byte("x")}, {Name: "l", Link: "d/f"}}}}
	var one, two bytes.Buffer
	require.NoError(t, im.WriteArchive(&one))
	require.NoError(t, im.WriteArchive(&two))
	assert.Equal(t, one.Bytes(), two.Bytes())
	require.Error(t, im.WriteArchive(failing{}))
}

type failing struct{}

func (failing) Write([]byte) (int, error) { return 0, errors.New("full") }

func TestParseLog(t *testing.T) {
	for _, c := range []struct{ name, log, stdout, stderr, fault string }{
		{name: "empty"},
		{name: "both", log: "T stdout F a b\nT stderr F c\n", stdout: "a b\n", stderr: "c\n"},
		{name: "continued", log: "T stdout P a\nT stdout F b\n", stdout: "ab\n"},
		{name: "being written", log: "T stdout F a\nT stdo", stdout: "a\n"},
		{name: "bad", log: "nonsense\n", fault: "not a line"},
	} {
		t.Run(c.name, func(t *testing.T) {
			stdout, stderr, err := parseLog(c.log)
			if c.fault != "" {
				require.ErrorContains(t, err, c.fault)
				return
			}
			require.NoError(t, err)
			assert.Equal(t, c.stdout, stdout)
			assert.Equal(t, c.stderr, stderr)
		})
	}
}

func TestOnlyOurProcessesAreKilled(t *testing.T) {
	n := &Node{Name: "clffffff", Dir: filepath.Join(baseDir, "clffffff")}
	// Somebody looks at the node's files.
	cmd := exec.Command("tail", "-f", "/dev/null", "--pid", "1")
	cmd.Args[0] = n.Dir
	require.NoError(t, cmd.Start())
	defer func() { _ = cmd.Process.Kill(); _ = cmd.Wait() }()
	all, err := n.processes()
	require.NoError(t, err)
	require.Len(t, all, 1)
	assert.False(t, process{exe: "bash", why: "cwd"}.ours())
	assert.True(t, process{exe: "qemu-system-x86_64", why: "command line"}.ours())
	assert.True(t, process{exe: "sleep", why: whyCgroup}.ours())
	require.NoError(t, n.killAll(t.Context()))
	assert.True(t, procid.Alive(cmd.Process.Pid))
}

func hasKind(things []string, kind string) bool {
	for _, t := range things {
		if strings.HasPrefix(t, kind+" ") {
			return true
		}
	}
	return false
}
