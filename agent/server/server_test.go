// SPDX-License-Identifier: Apache-2.0

package server

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	agentv1 "github.com/cloister-project/cloister/agent-protocol/v1"
	"github.com/cloister-project/cloister/agent-protocol/wire"
	"github.com/cloister-project/cloister/agent/container"
	"github.com/cloister-project/cloister/internal/idmap"
)

func TestMain(m *testing.M) {
	container.MaybeInit()
	code := m.Run()
	for _, pattern := range []string{"/c", ""} {
		left, _ := filepath.Glob("/sys/fs/cgroup/*" + testCgroup() + pattern)
		for _, dir := range left {
			_ = os.Remove(dir)
		}
	}
	os.Exit(code)
}

func testCgroup() string { return fmt.Sprintf("/cloister-test-%d", os.Getpid()) }

// sockets is a Transport of unix sockets in a directory, named by port.
type sockets string

func (s sockets) path(port uint32) string {
	return filepath.Join(string(s), strconv.Itoa(int(port)))
}
func (s sockets) Listen(port uint32) (net.Listener, error) { return net.Listen("unix", s.path(port)) }
func (s sockets) dial(ctx context.Context, port uint32) (net.Conn, error) {
	return (&net.Dialer{}).DialContext(ctx, "unix", s.path(port))
}
func (s sockets) DialReady(ctx context.Context) (net.Conn, error) {
	return s.dial(ctx, wire.ReadyPort(testCID))
}

// testCID stands for the guest's own.
const testCID = 3

type fakeSystem struct {
	clock    atomic.Int64
	powerOff atomic.Int32
	sysctls  map[string]string
}

func (f *fakeSystem) OnlineCPUs(context.Context, int) error { return nil }

func (f *fakeSystem) Timeline() []*agentv1.BootMark {
	return []*agentv1.BootMark{{Name: "init", Micros: 5}}
}
func (f *fakeSystem) SetClock(n int64) error                    { f.clock.Store(n); return nil }
func (f *fakeSystem) SetHostname(string) error                  { return nil }
func (f *fakeSystem) SetSysctls(values map[string]string) error { f.sysctls = values; return nil }
func (f *fakeSystem) PowerOff()                                 { f.powerOff.Add(1) }

type fakeStorage struct{ dir string }

func (f fakeStorage) SetupShm(uint64) error               { return nil }
func (f fakeStorage) SetupScratch(string) error           { return nil }
func (f fakeStorage) Usage(*agentv1.SandboxStatsResponse) {}
func (f fakeStorage) MountShared(_ context.Context, tag string) error {
	if tag == "panic" {
		panic("oh")
	}
	return errors.New("no such tag")
}
func (f fakeStorage) PutVolume(_ context.Context, r *agentv1.PutVolumeRequest) error {
	return fmt.Errorf("volume %s: %w", r.GetName(), errdefs.ErrInvalidArgument)
}
func (f fakeStorage) TerminationMessage(string) ([]byte, error) { return nil, nil }

func (f fakeStorage) PrepareMounts(context.Context, string, []*agentv1.Mount) ([]specs.Mount, error) {
	return []specs.Mount{{Destination: "/proc", Type: "proc", Source: "proc"}, {Destination: "/dev", Type: "tmpfs", Source: "tmpfs"}}, nil
}
func (f fakeStorage) Remove(_ context.Context, id string) ([]string, error) {
	return []string{"serial"}, os.RemoveAll(filepath.Join(f.dir, id))
}
func (f fakeStorage) MountRootfs(_ context.Context, id string, _ *agentv1.Rootfs, _ bool, _ idmap.Map) (string, error) {
	root := filepath.Join(f.dir, id)
	for _, d := range []string{"bin", "proc", "dev"} {
		if err := os.MkdirAll(filepath.Join(root, d), 0o755); err != nil {
			return "", err
		}
	}
	in, err := os.ReadFile("/usr/bin/busybox")
	if err != nil {
		return "", err
	}
	return root, os.WriteFile(filepath.Join(root, "bin/sh"), in, 0o755)
}

// host is the shim's end.
type host struct {
	t      *testing.T
	dir    sockets
	system *fakeSystem
	result chan error
	ready  net.Conn
	client agentv1.AgentService
}

// boot starts an agent and answers its Hello.
func boot(t *testing.T, reply *agentv1.HelloReply) *host {
	t.Helper()
	dir, err := os.MkdirTemp("", "cloister-server-")
	require.NoError(t, err)
	h := &host{t: t, dir: sockets(dir), system: &fakeSystem{}, result: make(chan error, 1)}
	l, err := h.dir.Listen(wire.ReadyPort(testCID))
	require.NoError(t, err)
	defer l.Close()
	ctx, cancel := context.WithCancel(context.Background())
	s := New(Config{
		System: h.system, Storage: fakeStorage{filepath.Join(dir, "roots")}, Transport: h.dir, StateDir: filepath.Join(dir,
			"state"), Version: "v-test", Cgroup: testCgroup(),
		Network: func(context.Context, *agentv1.Network) error { return nil },
	})
	go func() { h.result <- s.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if h.ready != nil {
			_ = h.ready.Close()
		}
		select {
		case <-h.result:
		case <-time.After(30 * time.Second):
			t.Error("the agent does not end")
		}
		require.NoError(t, os.RemoveAll(dir))
	})
	h.ready, err = l.Accept()
	require.NoError(t, err)
	var hello agentv1.Hello
	require.NoError(t, wire.ReadFrame(h.ready, &hello))
	require.EqualValues(t, wire.Major, hello.GetProtocolMajor())
	require.Equal(t, "v-test", hello.GetAgentVersion())
	require.NotEmpty(t, hello.GetKernelRelease())
	require.NotEmpty(t, hello.GetBootId())
	require.Equal(t, "init", hello.GetBootTimeline()[0].GetName())
	require.NoError(t, wire.WriteFrame(h.ready, reply))
	c := ttrpc.NewClient(h.ready)
	t.Cleanup(func() { _ = c.Close() })
	h.client = agentv1.NewAgentClient(c)
	return h
}

func good() *agentv1.HelloReply {
	return &agentv1.HelloReply{ProtocolMajor: wire.Major, UnixNanos: 42, ShimVersion: "shim", Token: testToken[:]}
}

// testToken is the one of all launches here.
var testToken = wire.NewToken()

// ended waits for the end of Run.
func (h *host) ended() error {
	h.t.Helper()
	select {
	case err := <-h.result:
		h.result <- err
		return err
	case <-time.After(30 * time.Second):
		h.t.Fatal("the agent does not end")
		return nil
	}
}

func (h *host) dial(port uint32) net.Conn {
	h.t.Helper()
	c, err := h.dir.dial(context.Background(), port)
	require.NoError(h.t, err)
	h.t.Cleanup(func() { _ = c.Close() })
	return c
}

func (h *host) rpc() agentv1.AgentService {
	conn := h.dial(wire.RPCPort)
	require.NoError(h.t, wire.OpenRPC(conn, testToken))
	c := ttrpc.NewClient(conn)
	h.t.Cleanup(func() { _ = c.Close() })
	return agentv1.NewAgentClient(c)
}

func ctx(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	t.Cleanup(cancel)
	return ctx
}

func TestServesOnAllConnections(t *testing.T) {
	defer goleak.VerifyNone(t, goleak.IgnoreCurrent())
	t.Run("run", func(t *testing.T) {
		h := boot(t, good())
		for _, c := range []agentv1.AgentService{h.client, h.rpc(), h.rpc()} {
			_, err := c.Ping(ctx(t), &agentv1.PingRequest{})
			require.NoError(t, err)
		}
		require.EqualValues(t, 42, h.system.clock.Load())
		_, err := h.client.SetClock(ctx(t), &agentv1.SetClockRequest{UnixNanos: 43})
		require.NoError(t, err)
		require.EqualValues(t, 43, h.system.clock.Load())
		require.NoError(t, h.ready.Close())
		require.ErrorIs(t, h.ended(), errHungUp)
		require.EqualValues(t, 1, h.system.powerOff.Load())
	})
}

func TestHandshakeFailures(t *testing.T) {
	for name, tc := range map[string]struct {
		reply *agentv1.HelloReply
		want  string
	}{
		"other version": {&agentv1.HelloReply{ProtocolMajor: wire.Major + 1, ShimVersion: "v9"},
			`the shim (version "v9") speaks protocol 3.0, this agent (version v-test) 2.2`},
		"no token":    {&agentv1.HelloReply{ProtocolMajor: wire.Major}, "the launch's token has 0 bytes, want 32"},
		"empty token": {&agentv1.HelloReply{ProtocolMajor: wire.Major, Token: make([]byte, wire.TokenLen)}, "all zeros"},
		"refused": {&agentv1.HelloReply{ProtocolMajor: wire.Major, Error: "no"},
			`the host refuses this agent (version v-test, protocol 2.2): "no"`},
	} {
		t.Run(name, func(t *testing.T) {
			h := boot(t, tc.reply)
			require.ErrorContains(t, h.ended(), tc.want)
			require.EqualValues(t, 1, h.system.powerOff.Load())
		})
	}
}

func TestRefuse(t *testing.T) {
	for name, tc := range map[string]struct{ reason, want string }{
		"cut within a character": {"another document" + strings.Repeat("é", maxRefusal), "another document"},
		"not UTF-8":              {"another document \xff\xfe", "another document ?"},
		"nothing":                {"", "not known"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := sockets(t.TempDir())
			l, err := dir.Listen(wire.ReadyPort(testCID))
			require.NoError(t, err)
			defer l.Close()
			told := make(chan error, 1)
			go func() {
				s := New(Config{System: &fakeSystem{}, Transport: dir, Version: "v-test", Platform: "snp"})
				told <- s.Refuse(ctx(t), errors.New(tc.reason))
			}()
			conn, err := l.Accept()
			require.NoError(t, err)
			var hello agentv1.Hello
			require.NoError(t, conn.SetDeadline(time.Now().Add(10*time.Second)))
			require.NoError(t, wire.ReadFrame(conn, &hello))
			require.Equal(t, "snp", hello.GetTee())
			require.Contains(t, hello.GetRefusal(), tc.want)
			require.LessOrEqual(t, len(hello.GetRefusal()), maxRefusal)
			require.NoError(t, conn.Close())
			require.NoError(t, <-told)
		})
	}
}

func TestNoHost(t *testing.T) {
	system := &fakeSystem{}
	dir := t.TempDir()
	err := New(Config{System: system, Transport: sockets(dir), StateDir: dir}).Run(context.Background())
	require.ErrorContains(t, err, "tell the host that the guest is ready")
	require.EqualValues(t, 1, system.powerOff.Load())
}

func TestErrorsAndPanics(t *testing.T) {
	h := boot(t, good())
	_, err := h.client.MountShared(ctx(t), &agentv1.MountSharedRequest{Tag: "panic"})
	require.Equal(t, codes.Internal, status.Code(err))
	require.ErrorContains(t, err, "MountShared")
	_, err = h.client.MountShared(ctx(t), &agentv1.MountSharedRequest{Tag: "x"})
	require.Equal(t, codes.Internal, status.Code(err), "an error without a kind")
	_, err = h.client.WaitProcess(ctx(t), &agentv1.WaitProcessRequest{ContainerId: "none"})
	require.True(t, errdefs.IsNotFound(errgrpc.ToNative(err)), "%v", err)
	_, err = h.client.CreateContainer(ctx(t), &agentv1.CreateContainerRequest{ContainerId: "c", Spec: []byte("{}")})
	require.Equal(t, codes.FailedPrecondition, status.Code(err), "not configured")
	_, err = h.client.CreateContainer(ctx(t), &agentv1.CreateContainerRequest{ContainerId: "/", Spec: []byte("{}")})
	require.Equal(t, codes.InvalidArgument, status.Code(err))
	_, err = h.client.ConfigureSandbox(ctx(t), &agentv1.ConfigureSandboxRequest{SandboxId: "../x"})
	require.Equal(t, codes.InvalidArgument, status.Code(err))
	_, err = h.client.UpdateNetwork(ctx(t), &agentv1.UpdateNetworkRequest{})
	require.Equal(t, codes.InvalidArgument, status.Code(err))
	short, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	_, err = h.client.NextEvents(short, &agentv1.NextEventsRequest{})
	require.Error(t, err)
	_, err = h.client.Ping(ctx(t), &agentv1.PingRequest{})
	require.NoError(t, err, "still alive")
}

func TestTooManyConnections(t *testing.T) {
	h := boot(t, good())
	clients := make([]agentv1.AgentService, maxConns)
	for i := range clients {
		clients[i] = h.rpc()
		_, err := clients[i].Ping(ctx(t), &agentv1.PingRequest{})
		require.NoError(t, err)
	}
	require.ErrorContains(t, wire.OpenRPC(h.dial(wire.RPCPort), testToken), "too many connections")
	_, err := h.client.Ping(ctx(t), &agentv1.PingRequest{})
	require.NoError(t, err, "the ready connection does not count")
}

func TestStreams(t *testing.T) {
	h := boot(t, good())
	id := wire.NewStreamID()
	require.NoError(t, wire.OpenStream(h.dial(wire.StreamPort), testToken, id))
	require.ErrorContains(t, wire.OpenStream(h.dial(wire.StreamPort), testToken, id), "refused")
	half := h.dial(wire.StreamPort)
	_, err := half.Write(append(testToken[:len(testToken):len(testToken)], 1, 2, 3))
	require.NoError(t, err)
	require.NoError(t, half.(*net.UnixConn).CloseWrite())
	answer, err := io.ReadAll(half)
	require.NoError(t, err)
	require.Equal(t, []byte{wire.Refused}, answer)
}

// The whole way of a container, over the protocol.
func TestContainer(t *testing.T) {
	if _, err := os.Stat("/usr/bin/busybox"); err != nil || os.Getuid() != 0 {
		t.Skip("needs root and busybox-static")
	}
	h := boot(t, good())
	_, err := h.client.ConfigureSandbox(ctx(t), &agentv1.ConfigureSandboxRequest{SandboxId: "pod",
		Sysctls: map[string]string{"kernel.shmmax": "1"}, Network: &agentv1.Network{}})
	require.NoError(t, err)
	require.Equal(t, map[string]string{"kernel.shmmax": "1"}, h.system.sysctls)
	_, err = h.client.ConfigureSandbox(ctx(t), &agentv1.ConfigureSandboxRequest{SandboxId: "pod"})
	require.Equal(t, codes.FailedPrecondition, status.Code(err))

	spec, err := json.Marshal(&specs.Spec{
		Process: &specs.Process{Args: []string{"/bin/sh", "-c", "read x; echo got $x; exit 3"}, Cwd: "/"},
		Linux: &specs.Linux{Namespaces: []specs.LinuxNamespace{
			{Type: specs.PIDNamespace}, {Type: specs.IPCNamespace, Path: "/x"}, {Type: specs.UTSNamespace, Path: "/x"},
		}},
	})
	require.NoError(t, err)
	in, out := wire.NewStreamID(), wire.NewStreamID()
	stdin, stdout := h.dial(wire.StreamPort), h.dial(wire.StreamPort)
	require.NoError(t, wire.OpenStream(stdin, testToken, in))
	_, err = h.client.CreateContainer(ctx(t), &agentv1.CreateContainerRequest{ContainerId: "c", Spec: spec,
		Stdio: &agentv1.Stdio{Stdin: in.String(), Stdout: out.String()}})
	require.NoError(t, err)
	require.NoError(t, wire.OpenStream(stdout, testToken, out))
	started, err := h.client.StartProcess(ctx(t), &agentv1.StartProcessRequest{ContainerId: "c"})
	require.NoError(t, err)
	require.NotZero(t, started.GetPid())
	exit := make(chan *agentv1.WaitProcessResponse, 1)
	waiter := h.rpc()
	go func() {
		r, _ := waiter.WaitProcess(ctx(t), &agentv1.WaitProcessRequest{ContainerId: "c"})
		exit <- r
	}()
	_, err = stdin.Write([]byte("this\n"))
	require.NoError(t, err)
	text, err := io.ReadAll(stdout)
	require.NoError(t, err)
	require.Equal(t, "got this\n", string(text))
	r := <-exit
	require.EqualValues(t, 3, r.GetExitStatus())
	require.EqualValues(t, len("got this\n"), r.GetStdoutBytes())
	_, err = h.client.SignalProcess(ctx(t), &agentv1.SignalProcessRequest{ContainerId: "c", Signal: uint32(unix.SIGTERM)})
	require.ErrorContains(t, err, "process already finished")
	deleted, err := h.client.DeleteProcess(ctx(t), &agentv1.DeleteProcessRequest{ContainerId: "c"})
	require.NoError(t, err)
	require.Equal(t, []string{"serial"}, deleted.GetReleasedSerials())

	// Shutdown with a living container: its exit is told, the answer comes, then the power goes.
	_, err = h.client.CreateContainer(ctx(t), &agentv1.CreateContainerRequest{ContainerId: "c", Spec: spec})
	require.NoError(t, err)
	go func() {
		r, _ := waiter.WaitProcess(ctx(t), &agentv1.WaitProcessRequest{ContainerId: "c"})
		exit <- r
	}()
	_, err = h.client.Ping(ctx(t), &agentv1.PingRequest{})
	require.NoError(t, err)
	_, err = h.client.Shutdown(ctx(t), &agentv1.ShutdownRequest{})
	require.NoError(t, err)
	require.EqualValues(t, 137, (<-exit).GetExitStatus())
	require.Zero(t, h.system.powerOff.Load())
	_, err = h.client.CreateContainer(ctx(t), &agentv1.CreateContainerRequest{ContainerId: "d", Spec: spec})
	require.Error(t, err)
	require.NoError(t, h.ended())
	require.EqualValues(t, 1, h.system.powerOff.Load())
}

func TestMeminfo(t *testing.T) {
	raw := []byte("MemTotal:       16384 kB\nMemAvailable:     12 kB\nOdd: x\n")
	require.EqualValues(t, 16<<20, meminfo(raw, "MemTotal:"))
	require.EqualValues(t, 12<<10, meminfo(raw, "MemAvailable:"))
	require.Zero(t, meminfo(raw, "Odd:"))
	require.Zero(t, meminfo(raw, "None:"))
	got, err := readGuestStats()
	require.NoError(t, err)
	require.NotZero(t, got.GetAgentRss())
	require.NotZero(t, got.GetUptimeMicros())
	require.Greater(t, got.GetMemoryTotal(), got.GetMemoryAvailable())
}
