// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/pkg/shim"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cloister-project/cloister/test/harness"
)

// outcome is what a user sees of a container that cannot run as asked.
type outcome struct {
	status   int32
	reason   string
	messages string
}

// Commands that do not exist or cannot be executed: what Cloister says is what runc says.
func TestCommandsThatCannotRun(t *testing.T) {
	n := sharedNode(t)
	ctx := testContext(t)
	empty := harness.Empty("localhost/cloister/empty:latest")
	require.NoError(t, n.Import(ctx, empty))
	outcomes := map[string]map[string]outcome{}
	for _, handler := range []string{harness.HandlerRunc, harness.HandlerCloister} {
		outcomes[handler] = map[string]outcome{}
		pod := runPod(t, n, harness.PodSpec{Handler: handler})
		for name, spec := range map[string]harness.ContainerSpec{
			"image without layers": {Image: empty.Name, Command: []string{"/nothing"}},
			"no such file":         {Command: []string{"/no/such/program"}},
			"not in PATH":          {Command: []string{"nosuchprogram"}},
			"not executable":       {Command: []string{"/etc/passwd"}},
			"a directory":          {Command: []string{"/etc"}},
			"working directory below a file": {Command: []string{"/bin/true"},
				Change: func(c *runtimeapi.ContainerConfig) { c.WorkingDir = "/etc/passwd/x" }},
		} {
			c, err := pod.Create(ctx, spec)
			require.NoError(t, err, name)
			started := c.Start(ctx)
			status, err := c.Status(ctx)
			require.NoError(t, err)
			if assert.Error(t, started, "%s with %s", name, handler) {
				outcomes[handler][name] = outcome{status.GetExitCode(), status.GetReason(), started.Error()}
			}
			require.NoError(t, c.Remove(ctx))
		}
		c := runContainer(t, pod, harness.ContainerSpec{})
		for name, command := range map[string]string{
			"exec: no such file": "/no/such/program", "exec: not in PATH": "nosuchprogram", "exec: not executable": "/etc/passwd",
		} {
			_, err := c.Exec(ctx, command)
			if assert.Error(t, err, "%s with %s", name, handler) {
				outcomes[handler][name] = outcome{messages: err.Error()}
			}
		}
		// Neither has the pod come to harm.
		assert.Equal(t, "0022", output(t, c, "umask"))
		removeAll(t, n, pod)
	}
	for name, want := range outcomes[harness.HandlerRunc] {
		got := outcomes[harness.HandlerCloister][name]
		assert.Equal(t, want.status, got.status, name)
		assert.Equal(t, want.reason, got.reason, name)
		assert.Contains(t, got.messages, essence(want.messages), name)
	}
}

// essence is the part of runc's message that tells what is wrong: from the quoted command on.
func essence(message string) string {
	if i := strings.Index(message, `exec: "`); i >= 0 {
		message = message[i:]
	} else if i := strings.Index(message, "unable to start container process"); i >= 0 {
		message = message[i:]
	}
	message, _, _ = strings.Cut(message, "\n")
	return strings.TrimSuffix(message, ": unknown")
}

// With ctr the exit status is the command's, and of a command that does not exist ctr's own.
func TestCtrFaults(t *testing.T) {
	n := sharedNode(t)
	ctx := testContext(t)
	runTask := func(runtime string, id string, command ...string) result {
		args := []string{"run", "--rm", "--runtime", runtime}
		if runtime == "io.containerd.cloister.v2" {
			args = append(args, "--runtime-config-path", n.CloisterConfig)
		} else {
			args = append(args, "--runc-binary", filepath.Join(n.Artifacts().Conformance, "runc"))
		}
		return run(t, n.Ctr(ctx, append(append(args, harness.BusyboxImage, id), command...)...))
	}
	t.Run("command does not exist", func(t *testing.T) {
		want := runTask("io.containerd.runc.v2", "missing-runc", "/no/such/program")
		got := runTask("io.containerd.cloister.v2", "missing-cloister", "/no/such/program")
		assert.Equal(t, want.status, got.status)
		assert.Contains(t, got.stderr, strings.TrimSpace(essence(want.stderr)))
		requireNothingLeft(t, n)
	})
	t.Run("state directory is there already", func(t *testing.T) {
		directory := stateDirectory(n, n.Name, "twice")
		require.NoError(t, os.MkdirAll(directory, 0o700))
		got := runTask("io.containerd.cloister.v2", "twice", "true")
		assert.NotZero(t, got.status)
		requireContains(t, got.stderr, directory, "is there already", "containerd-shim-cloister-v2 delete")
		assert.DirExists(t, directory, "it is another's")
		require.NoError(t, os.Remove(directory))
		requireNothingLeft(t, n)
	})
	t.Run("socket of a dead shim is in the way", func(t *testing.T) {
		address, err := shim.CreateSocketAddress(namespaces.WithNamespace(ctx, n.Name), filepath.Join(n.Dir, "s"), n.Socket, "stale", false)
		require.NoError(t, err)
		// What a shim that was killed leaves: a socket that nobody listens on.
		l, err := net.ListenUnix("unix", &net.UnixAddr{Name: strings.TrimPrefix(address, "unix://"), Net: "unix"})
		require.NoError(t, err)
		l.SetUnlinkOnClose(false)
		require.NoError(t, l.Close())
		got := runTask("io.containerd.cloister.v2", "stale", "sh", "-c", "exit 42")
		assert.Equal(t, 42, got.status, got.stderr)
		requireNothingLeft(t, n)
	})
	t.Run("mounts of an unknown type and without a path, at once", func(t *testing.T) {
		got := run(t, n.Ctr(ctx, "run", "--rm", "--runtime", "io.containerd.cloister.v2", "--runtime-config-path", n.CloisterConfig,
			"--mount", "type=nosuchfs,src=/x,dst=/one,options=rw", "--mount", "type=bind,src=relative,dst=/two,options=rbind:ro",
			harness.BusyboxImage, "mounts", "true"))
		assert.NotZero(t, got.status)
		requireContains(t, got.stderr, "nosuchfs", "/one", "not known", "/two", "not an absolute path")
		requireNothingLeft(t, n)
	})
}

// stateDirectory is where the shim keeps the state of a pod: its name is a hash, since sockets live below it.
func stateDirectory(n *harness.Node, namespace, id string) string {
	sum := sha256.Sum256([]byte(namespace + "\x00" + id))
	return filepath.Join(n.CloisterState, hex.EncodeToString(sum[:8]))
}

// What a VM cannot give is refused, all of it at once, and the pod and its other containers live on.
func TestRefusals(t *testing.T) {
	n := sharedNode(t)
	ctx := testContext(t)
	dir := t.TempDir()
	socket := filepath.Join(dir, "socket")
	l, err := net.Listen("unix", socket)
	require.NoError(t, err)
	defer l.Close()
	fifo := filepath.Join(dir, "fifo")
	require.NoError(t, unix.Mkfifo(fifo, 0o600))
	// A layer cache of its own, to be filled and spoilt, and no virtiofsd.
	cache, unmountCache := mountTmpfs(t, n, "cache", "size=96m")
	withSettings(t, n, fmt.Sprintf("rootfs.cache_dir = %q\nhypervisor.virtiofsd = '/nowhere/virtiofsd'", cache))
	pod := runPod(t, n, harness.PodSpec{})
	bystander := runContainer(t, pod, harness.ContainerSpec{})

	// requireRefused makes a container that must not be, wherever containerd finds out.
	requireRefused := func(t *testing.T, spec harness.ContainerSpec, want ...string) {
		t.Helper()
		spec.Script = idle
		c, err := pod.Run(ctx, spec)
		if err == nil {
			require.NoError(t, c.Remove(ctx))
		}
		require.Error(t, err)
		t.Logf("the error: %v", err)
		requireContains(t, err.Error(), want...)
	}
	t.Run("devices, propagation, sockets, pipes, all at once", func(t *testing.T) {
		both, unmount := mountTmpfs(t, n, "both", "size=1m")
		defer unmount()
		require.NoError(t, unix.Mount("", both, "", unix.MS_SHARED, ""))
		requireRefused(t, harness.ContainerSpec{
			Mounts: []*runtimeapi.Mount{
				{HostPath: both, ContainerPath: "/both", Propagation: runtimeapi.MountPropagation_PROPAGATION_BIDIRECTIONAL},
				{HostPath: both, ContainerPath: "/follows", Propagation: runtimeapi.MountPropagation_PROPAGATION_HOST_TO_CONTAINER},
				{HostPath: socket, ContainerPath: "/socket"}, {HostPath: fifo, ContainerPath: "/fifo"}, {HostPath: "/dev/null",
					ContainerPath: "/device"},
			},
			Change: func(c *runtimeapi.ContainerConfig) {
				c.Devices = []*runtimeapi.Device{{HostPath: "/dev/loop-control", ContainerPath: "/dev/loop-control", Permissions: "rwm"}}
			},
		}, "/dev/loop-control", "none of the host's devices", "/both", "Bidirectional", "/follows",
			"HostToContainer", socket, fifo, "/device", "only files and directories")
	})
	t.Run("source of a mount is removed", func(t *testing.T) {
		gone := filepath.Join(dir, "gone")
		require.NoError(t, os.Mkdir(gone, 0o755))
		c, err := pod.Create(ctx, harness.ContainerSpec{Script: idle, Mounts: []*runtimeapi.Mount{{HostPath: gone, ContainerPath: "/gone"}}})
		require.NoError(t, err)
		require.NoError(t, os.Remove(gone))
		err = c.Start(ctx)
		require.Error(t, err)
		requireContains(t, err.Error(), gone, "/gone", "no such file")
		require.NoError(t, c.Remove(ctx))
	})
	t.Run("layer is unreadable", func(t *testing.T) {
		im, err := harness.Busybox("localhost/cloister/broken:latest", n.Artifacts().Busybox)
		require.NoError(t, err)
		im.Layers[0] = append(im.Layers[0], harness.File{Name: "broken", Body: []byte(dir)})
		require.NoError(t, n.Import(ctx, im))
		c, err := pod.Create(ctx, harness.ContainerSpec{Image: im.Name, Script: idle})
		require.NoError(t, err)
		snapshots, err := filepath.Glob(filepath.Join(n.Root, "io.containerd.snapshotter.v1.overlayfs", "snapshots", "*", "fs", "broken"))
		require.NoError(t, err)
		require.Len(t, snapshots, 1)
		layer := filepath.Dir(snapshots[0])
		require.NoError(t, os.Rename(layer, layer+".away"))
		err = c.Start(ctx)
		assert.NoError(t, os.Rename(layer+".away", layer))
		require.Error(t, err)
		t.Logf("the error: %v", err)
		requireContains(t, err.Error(), "root filesystem", layer, "no such file")
		require.NoError(t, c.Remove(ctx))
	})
	t.Run("virtiofsd is missing", func(t *testing.T) {
		requireRefused(t, harness.ContainerSpec{Mounts: []*runtimeapi.Mount{{HostPath: dir, ContainerPath: "/directory"}}},
			"hypervisor.virtiofsd", "/nowhere/virtiofsd", "install virtiofsd")
	})
	t.Run("disk of the layer cache is full", func(t *testing.T) {
		im, err := harness.Busybox("localhost/cloister/huge:latest", n.Artifacts().Busybox)
		require.NoError(t, err)
		im.Layers = append(im.Layers, []harness.File{{Name: "huge", Body: make([]byte, 100<<20)}})
		require.NoError(t, n.Import(ctx, im))
		requireRefused(t, harness.ContainerSpec{Image: im.Name}, "root filesystem", "rootfs.cache_dir", "no space left")
	})
	t.Run("cached layer is corrupt and built again", func(t *testing.T) {
		im, err := harness.Busybox("localhost/cloister/corrupt:latest", n.Artifacts().Busybox)
		require.NoError(t, err)
		im.Layers[0] = append(im.Layers[0], harness.File{Name: "corrupt", Body: []byte(dir)})
		require.NoError(t, n.Import(ctx, im))
		before := filesIn(t, cache)
		c, err := pod.Run(ctx, harness.ContainerSpec{Image: im.Name, Script: idle})
		require.NoError(t, err)
		require.NoError(t, c.Remove(ctx))
		var images []string
		for path := range filesIn(t, cache) {
			if !before[path] && strings.HasSuffix(path, ".img") {
				images = append(images, path)
			}
		}
		require.Len(t, images, 1)
		info, err := os.Stat(images[0])
		require.NoError(t, err)
		require.NoError(t, os.WriteFile(images[0], make([]byte, info.Size()), 0o600))
		again := runContainer(t, pod, harness.ContainerSpec{Image: im.Name})
		assert.Equal(t, dir, output(t, again, "cat /corrupt"))
	})
	assert.Equal(t, "alive", output(t, bystander, "echo alive"))
	require.NoError(t, pod.Remove(ctx))
	unmountCache()
	removeAll(t, n, pod)
}

// filesIn lists all files below a directory.
func filesIn(t *testing.T, dir string) map[string]bool {
	t.Helper()
	files := map[string]bool{}
	require.NoError(t, filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			files[path] = true
		}
		return err
	}))
	return files
}

// A request whose caller leaves half-way leaves nothing.
func TestCancelled(t *testing.T) {
	n := sharedNode(t)
	ctx := testContext(t)
	// cancelWhen runs a request and cancels it as soon as a condition comes true.
	cancelWhen := func(t *testing.T, what string, ok func() bool, request func(context.Context) error) {
		t.Helper()
		requestCtx, cancel := context.WithCancel(ctx)
		done := make(chan error, 1)
		go func() { done <- request(requestCtx) }()
		waitFor(t, ctx, what, ok)
		cancel()
		require.Error(t, <-done)
	}
	exists := func(prefix string) func() bool {
		return func() bool {
			pids, err := n.Pids(prefix)
			return err == nil && len(pids) > 0
		}
	}
	for _, prefix := range []string{"containerd-shim-cloister", "qemu-system"} {
		t.Run("RunPodSandbox once there is "+prefix, func(t *testing.T) {
			cancelWhen(t, prefix, exists(prefix), func(ctx context.Context) error {
				_, err := n.CRI().RunPod(ctx, harness.PodSpec{Handler: harness.HandlerCloister})
				return err
			})
			removeUnwanted(t, n)
		})
	}
	t.Run("StartContainer while its root is made", func(t *testing.T) {
		// Large and not to be compressed away: making the layer's image takes a moment.
		im, err := harness.Busybox("localhost/cloister/large:latest", n.Artifacts().Busybox)
		require.NoError(t, err)
		for i := range 2000 {
			im.Layers[0] = append(im.Layers[0], harness.File{Name: fmt.Sprintf("file-%d", i), Body: []byte(strings.Repeat(fmt.Sprint(i), 4096))})
		}
		require.NoError(t, n.Import(ctx, im))
		pod := runPod(t, n, harness.PodSpec{})
		c, err := pod.Create(ctx, harness.ContainerSpec{Image: im.Name, Script: idle})
		require.NoError(t, err)
		began := func() bool {
			entries, err := filepath.Glob(filepath.Join(n.State, "io.containerd.runtime.v2.task", "k8s.io", c.ID))
			return err == nil && len(entries) > 0
		}
		cancelWhen(t, "the container's bundle", began, c.Start)
		// The client has its answer before containerd has given up.
		waitFor(t, ctx, "the container can be removed", func() bool { return c.Remove(ctx) == nil })
		// The pod has not come to harm, and the same image works now.
		again := runContainer(t, pod, harness.ContainerSpec{Image: im.Name})
		assert.Equal(t, "1999", output(t, again, "head -c 4 /file-1999"))
		removeAll(t, n, pod)
	})
}

// removeUnwanted removes what containerd keeps of pods whose making was given up, as kubelet does, and looks for leftovers.
func removeUnwanted(t *testing.T, n *harness.Node) {
	t.Helper()
	ctx := testContext(t)
	list, err := n.CRI().Runtime.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{})
	require.NoError(t, err)
	for _, p := range list.GetItems() {
		_, err := n.CRI().Runtime.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: p.GetId()})
		require.NoError(t, err)
		_, err = n.CRI().Runtime.RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: p.GetId()})
		require.NoError(t, err)
	}
	requireNothingLeft(t, n)
}
