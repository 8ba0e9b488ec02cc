// SPDX-License-Identifier: Apache-2.0

package shim

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	bootapi "github.com/containerd/containerd/api/runtime/bootstrap/v1"
	sandboxapi "github.com/containerd/containerd/api/runtime/sandbox/v1"
	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	eventsapi "github.com/containerd/containerd/api/services/ttrpc/events/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"
	"github.com/opencontainers/runtime-spec/specs-go"
	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/cloister-project/cloister/internal/procid"
	"github.com/cloister-project/cloister/shim/bundle"
	"github.com/cloister-project/cloister/shim/internal/podtest"
)

// actEnv makes this test's binary act as the shim, with pods that have no VM.
const actEnv = "CLOISTER_TEST_ACT_AS_SHIM"

func TestMain(m *testing.M) {
	if os.Getenv(actEnv) != "" {
		factory := &podtest.Factory{}
		os.Exit(run(factory.New, func(_ context.Context, bundle string) error {
			return os.WriteFile(filepath.Join(bundle, "cleaned"), nil, 0o600)
		}))
	}
	os.Exit(m.Run())
}

// daemon plays containerd: it takes events, and starts shims in the dialect of a version.
type daemon struct {
	t       *testing.T
	dir     string
	address string

	mu     sync.Mutex
	topics []string
}

func (d *daemon) Forward(_ context.Context, r *eventsapi.ForwardRequest) (*emptypb.Empty, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.topics = append(d.topics, r.GetEnvelope().GetNamespace()+r.GetEnvelope().GetTopic())
	return &emptypb.Empty{}, nil
}

func (d *daemon) events() []string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return append([]string(nil), d.topics...)
}

func newDaemon(t *testing.T) *daemon {
	dir, err := os.MkdirTemp("", "shim") // t.TempDir is too long for a socket
	require.NoError(t, err)
	d := &daemon{t: t, dir: dir, address: filepath.Join(dir, "c.ttrpc")}
	server, err := ttrpc.NewServer()
	require.NoError(t, err)
	eventsapi.RegisterTTRPCEventsService(server, d)
	l, err := net.Listen("unix", d.address)
	require.NoError(t, err)
	go func() { _ = server.Serve(context.Background(), l) }()
	t.Cleanup(func() {
		require.NoError(t, server.Close())
		require.NoError(t, os.RemoveAll(dir))
	})
	return d
}

// bundle makes a bundle with the FIFO for the shim's log, which is read all the time as containerd does.
func (d *daemon) bundle(id string, spec *specs.Spec) string {
	dir := filepath.Join(d.dir, id)
	require.NoError(d.t, os.Mkdir(dir, 0o700))
	if spec != nil {
		data, err := json.Marshal(spec)
		require.NoError(d.t, err)
		require.NoError(d.t, os.WriteFile(filepath.Join(dir, "config.json"), data, 0o600))
	}
	require.NoError(d.t, syscall.Mkfifo(filepath.Join(dir, "log"), 0o700))
	log, err := os.OpenFile(filepath.Join(dir, "log"), os.O_RDWR, 0)
	require.NoError(d.t, err)
	go func() { _, _ = io.Copy(io.Discard, log) }()
	d.t.Cleanup(func() { _ = log.Close() })
	return dir
}

// invoke runs the shim's binary as containerd does and gives stdout and stderr together.
func (d *daemon) invoke(dir string, stdin []byte, args ...string) ([]byte, error) {
	self, err := os.Executable()
	require.NoError(d.t, err)
	cmd := exec.Command(self, append([]string{"-namespace", "k8s.io", "-address", filepath.Join(d.dir, "c.grpc"), "-publish-binary",
		"/usr/bin/containerd"}, args...)...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), actEnv+"=1", "GORACE=atexit_sleep_ms=0", "GOMAXPROCS=2", "MAX_SHIM_VERSION=2", "TTRPC_ADDRESS="+d.address)
	if stdin != nil {
		cmd.Stdin = bytes.NewReader(stdin)
	}
	return cmd.CombinedOutput()
}

// params of containerd 2.4.
func (d *daemon) params(id string) []byte {
	socketDir := filepath.Join(d.dir, "sock")
	data, err := proto.Marshal(&bootapi.BootstrapParams{
		InstanceID: id, Namespace: "k8s.io", ContainerdVersion: "v2.4.2", SocketDir: &socketDir,
		ContainerdGrpcAddress: filepath.Join(d.dir, "c.grpc"), ContainerdTtrpcAddress: d.address, LogLevel: bootapi.LogLevel_LOG_LEVEL_DEBUG,
	})
	require.NoError(d.t, err)
	return data
}

// start starts a shim as containerd 2.4 does and connects to it.
func (d *daemon) start(id, dir string) (*ttrpc.Client, string) {
	out, err := d.invoke(dir, d.params(id), "-id", id, "start")
	require.NoError(d.t, err, string(out))
	// A test that fails leaves no process behind.
	d.t.Cleanup(func() { _ = bundle.EndShim(context.Background(), dir, 0) })
	var result bootapi.BootstrapResult
	require.NoError(d.t, proto.Unmarshal(out, &result))
	var caps types.MountCapabilities
	found, err := result.FindExtension(&caps)
	require.NoError(d.t, err)
	require.True(d.t, found)
	path := strings.TrimPrefix(result.GetAddress(), "unix://")
	conn, err := net.Dial("unix", path)
	require.NoError(d.t, err)
	client := ttrpc.NewClient(conn)
	d.t.Cleanup(func() { _ = client.Close() })
	return client, path
}

// pid of the shim that serves a client.
func (d *daemon) pid(c *ttrpc.Client) int {
	resp, err := taskapi.NewTTRPCTaskClient(c).Connect(d.t.Context(), &taskapi.ConnectRequest{ID: "x"})
	require.NoError(d.t, err)
	return int(resp.GetShimPid())
}

func (d *daemon) awaitGone(pid int, socket string) {
	require.Eventually(d.t, func() bool { return !procid.Alive(pid) }, 20*time.Second, 5*time.Millisecond, "the process is still there")
	require.NoFileExists(d.t, socket)
	left, err := os.ReadDir(filepath.Dir(socket))
	require.NoError(d.t, err)
	require.Empty(d.t, left, "no debug socket is left either")
}

func rss(t *testing.T, pid int) int {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	require.NoError(t, err)
	for line := range strings.Lines(string(status)) {
		if f := strings.Fields(line); f[0] == "VmRSS:" {
			n, err := strconv.Atoi(f[1])
			require.NoError(t, err)
			return n
		}
	}
	return 0
}

func TestSandboxProcess(t *testing.T) {
	d := newDaemon(t)
	dir := d.bundle("s", nil) // sandboxer = "shim" has no config.json
	client, socket := d.start("s", dir)
	pid := d.pid(client)
	sb, tasks := sandboxapi.NewTTRPCSandboxClient(client), taskapi.NewTTRPCTaskClient(client)

	_, err := sb.StartSandbox(t.Context(), &sandboxapi.StartSandboxRequest{SandboxID: "s"})
	require.ErrorIs(t, errgrpc.ToNative(err), errdefs.ErrFailedPrecondition, "statuses come out of the kinds")
	_, err = sb.CreateSandbox(t.Context(), &sandboxapi.CreateSandboxRequest{SandboxID: "s", BundlePath: dir, NetnsPath: "/run/netns/x"})
	require.NoError(t, err)
	started, err := sb.StartSandbox(t.Context(), &sandboxapi.StartSandboxRequest{SandboxID: "s"})
	require.NoError(t, err)
	require.Equal(t, uint32(podtest.PID), started.GetPid())

	for i := range 5 {
		id := fmt.Sprintf("c%d", i)
		_, err = tasks.Create(t.Context(), &taskapi.CreateTaskRequest{ID: id, Bundle: d.bundle(id, &specs.Spec{Process: &specs.Process{}})})
		require.NoError(t, err)
		_, err = tasks.Start(t.Context(), &taskapi.StartRequest{ID: id})
		require.NoError(t, err)
	}
	t.Logf("RSS of the shim without VM, one pod, five containers: %d KiB", rss(t, pid))
	require.Less(t, rss(t, pid), 60<<10, "a test's binary is larger than the shim")

	// After the deletion of each task containerd asks for the end.
	_, err = tasks.Shutdown(t.Context(), &taskapi.ShutdownRequest{ID: "c0"})
	require.NoError(t, err)
	waited := make(chan error, 1)
	go func() {
		_, err := sb.WaitSandbox(t.Context(), &sandboxapi.WaitSandboxRequest{SandboxID: "s"})
		waited <- err
	}()
	_, err = sb.StopSandbox(t.Context(), &sandboxapi.StopSandboxRequest{SandboxID: "s"})
	require.NoError(t, err)
	require.NoError(t, <-waited)
	_, err = sb.ShutdownSandbox(t.Context(), &sandboxapi.ShutdownSandboxRequest{SandboxID: "s"})
	require.NoError(t, err, "it is answered before the process ends")

	out, err := d.invoke(dir, nil, "-id", "s", "-bundle", dir, "delete")
	require.NoError(t, err)
	d.awaitGone(pid, socket)
	var deleted taskapi.DeleteResponse
	require.NoError(t, proto.Unmarshal(out, &deleted))
	require.Equal(t, uint32(0), deleted.GetExitStatus())
	require.FileExists(t, filepath.Join(dir, "cleaned"))

	events := d.events()
	require.Len(t, events, 15, "every event was delivered before the process ended")
	require.Equal(t, "k8s.io/tasks/create", events[0])
	require.Equal(t, "k8s.io/tasks/exit", events[14])
}

func TestShutdownAnswers(t *testing.T) {
	// The race between the last answer and the end of the process would show here.
	for range 20 {
		d := newDaemon(t)
		dir := d.bundle("s", nil)
		client, socket := d.start("s", dir)
		pid := d.pid(client)
		_, err := sandboxapi.NewTTRPCSandboxClient(client).ShutdownSandbox(t.Context(), &sandboxapi.ShutdownSandboxRequest{SandboxID: "s"})
		require.NoError(t, err)
		d.awaitGone(pid, socket)
	}
}

func TestTaskProcess(t *testing.T) {
	d := newDaemon(t)
	dir := d.bundle("c", &specs.Spec{
		Process: &specs.Process{}, Linux: &specs.Linux{Namespaces: []specs.LinuxNamespace{{Type: specs.NetworkNamespace}}},
	})
	client, socket := d.start("c", dir)
	pid := d.pid(client)
	tasks := taskapi.NewTTRPCTaskClient(client)
	_, err := tasks.Create(t.Context(), &taskapi.CreateTaskRequest{ID: "c", Bundle: dir})
	require.NoError(t, err)
	_, err = tasks.Start(t.Context(), &taskapi.StartRequest{ID: "c"})
	require.NoError(t, err)
	_, err = tasks.Kill(t.Context(), &taskapi.KillRequest{ID: "c", Signal: 9})
	require.NoError(t, err)
	wait, err := tasks.Wait(t.Context(), &taskapi.WaitRequest{ID: "c"})
	require.NoError(t, err)
	require.Equal(t, uint32(137), wait.GetExitStatus())
	_, err = tasks.Delete(t.Context(), &taskapi.DeleteRequest{ID: "c"})
	require.NoError(t, err)
	_, err = tasks.Shutdown(t.Context(), &taskapi.ShutdownRequest{ID: "c"})
	require.NoError(t, err)
	d.awaitGone(pid, socket)
	require.Equal(t, []string{"k8s.io/tasks/create", "k8s.io/tasks/start", "k8s.io/tasks/exit", "k8s.io/tasks/delete"}, d.events())
}

func TestSIGTERMStopsThePod(t *testing.T) {
	d := newDaemon(t)
	dir := d.bundle("s", nil)
	client, socket := d.start("s", dir)
	pid := d.pid(client)
	sb := sandboxapi.NewTTRPCSandboxClient(client)
	_, err := sb.CreateSandbox(t.Context(), &sandboxapi.CreateSandboxRequest{SandboxID: "s", BundlePath: dir})
	require.NoError(t, err)
	_, err = sb.StartSandbox(t.Context(), &sandboxapi.StartSandboxRequest{SandboxID: "s"})
	require.NoError(t, err)
	require.NoError(t, syscall.Kill(pid, syscall.SIGTERM))
	d.awaitGone(pid, socket)
	_, err = bundle.ReadExit(dir)
	require.NoError(t, err, "the pod was stopped")
}

func TestDeleteEndsADaemonThatIsLeft(t *testing.T) {
	d := newDaemon(t)
	dir := d.bundle("s", nil)
	client, socket := d.start("s", dir)
	pid := d.pid(client)
	out, err := d.invoke(dir, nil, "-id", "s", "-bundle", dir, "delete")
	require.NoError(t, err)
	d.awaitGone(pid, socket)
	var deleted taskapi.DeleteResponse
	require.NoError(t, proto.Unmarshal(out, &deleted))
	require.Equal(t, uint32(137), deleted.GetExitStatus())
	out, err = d.invoke(dir, nil, "-id", "s", "-bundle", dir, "delete")
	require.NoError(t, err, "repeatable: %s", out)
}

func TestWorkingDirectoryThatIsGone(t *testing.T) {
	// containerd may remove the bundle while the process ends.
	d := newDaemon(t)
	dir := d.bundle("s", nil)
	client, socket := d.start("s", dir)
	pid := d.pid(client)
	require.NoError(t, os.RemoveAll(dir))
	_, err := sandboxapi.NewTTRPCSandboxClient(client).ShutdownSandbox(t.Context(), &sandboxapi.ShutdownSandboxRequest{SandboxID: "s"})
	require.NoError(t, err)
	d.awaitGone(pid, socket)
}

func TestGroupedStart(t *testing.T) {
	d := newDaemon(t)
	dir := d.bundle("s", nil)
	client, socket := d.start("s", dir)
	member := d.bundle("m", &specs.Spec{Annotations: map[string]string{"io.kubernetes.cri.sandbox-id": "s"}})
	second, path := d.start("m", member)
	require.Equal(t, socket, path)
	require.Equal(t, d.pid(client), d.pid(second))
	out, err := d.invoke(member, nil, "-id", "m", "-bundle", member, "delete")
	require.NoError(t, err, string(out))
	pid := d.pid(client) // still there
	_, err = sandboxapi.NewTTRPCSandboxClient(client).ShutdownSandbox(t.Context(), &sandboxapi.ShutdownSandboxRequest{SandboxID: "s"})
	require.NoError(t, err)
	d.awaitGone(pid, socket)
}

func TestStartThatFailsSaysWhy(t *testing.T) {
	d := newDaemon(t)
	dir := d.bundle("s", nil)
	out, err := d.invoke(dir, d.params("another"), "-id", "s", "start")
	require.Error(t, err)
	require.Contains(t, string(out), "the command line says")
}

func TestInfoAndVersion(t *testing.T) {
	d := newDaemon(t)
	out, err := d.invoke(d.dir, nil, "-v")
	require.NoError(t, err)
	require.Contains(t, string(out), "io.containerd.cloister.v2")
	out, err = d.invoke(d.dir, nil, "-info")
	require.NoError(t, err)
	var info types.RuntimeInfo
	require.NoError(t, proto.Unmarshal(out, &info))
	require.Equal(t, "io.containerd.cloister.v2", info.GetName())
}
