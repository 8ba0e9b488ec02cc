// SPDX-License-Identifier: Apache-2.0

package virtcontainers

import (
	"context"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/containerd/containerd/api/types"
	"github.com/containerd/ttrpc"
	"github.com/stretchr/testify/require"

	agentv1 "github.com/cloister-project/cloister/agent-protocol/v1"
	"github.com/cloister-project/cloister/agent-protocol/wire"
	"github.com/cloister-project/cloister/configs"
	"github.com/cloister-project/cloister/hypervisor"
	"github.com/cloister-project/cloister/hypervisor/vsock"
	"github.com/cloister-project/cloister/tee"
	"github.com/cloister-project/cloister/virtcontainers/guest"
	"github.com/cloister-project/cloister/virtcontainers/network"
	"github.com/cloister-project/cloister/virtcontainers/rootfs"
	"github.com/cloister-project/cloister/virtcontainers/standin"
)

// fakeAgent is an agent whose processes run until they are signalled.
type fakeAgent struct {
	agentv1.AgentService

	mu      sync.Mutex
	created []*agentv1.CreateContainerRequest
	deleted []string
	// refuse is the fault of CreateContainer; creating is called in it, and execing where a further process is made or
	// started.
	refuse   error
	creating func()
	execing  func()
	ended    map[string]chan struct{}
}

func (a *fakeAgent) end(id string) chan struct{} {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.ended == nil {
		a.ended = map[string]chan struct{}{}
	}
	if a.ended[id] == nil {
		a.ended[id] = make(chan struct{})
	}
	return a.ended[id]
}

func (a *fakeAgent) CreateContainer(_ context.Context, r *agentv1.CreateContainerRequest) (*agentv1.CreateContainerResponse, error) {
	a.mu.Lock()
	a.created = append(a.created, r)
	refuse, creating := a.refuse, a.creating
	a.mu.Unlock()
	if creating != nil {
		creating()
	}
	return &agentv1.CreateContainerResponse{}, refuse
}

func (a *fakeAgent) CreateProcess(context.Context, *agentv1.CreateProcessRequest) (*agentv1.CreateProcessResponse, error) {
	if a.execing != nil {
		a.execing()
	}
	return &agentv1.CreateProcessResponse{}, nil
}

func (a *fakeAgent) StartProcess(_ context.Context, r *agentv1.StartProcessRequest) (*agentv1.StartProcessResponse, error) {
	if a.execing != nil && r.GetExecId() != "" {
		a.execing()
	}
	return &agentv1.StartProcessResponse{}, nil
}

func (a *fakeAgent) PauseContainer(context.Context, *agentv1.PauseContainerRequest) (*agentv1.PauseContainerResponse, error) {
	return &agentv1.PauseContainerResponse{}, nil
}

func (a *fakeAgent) ResumeContainer(context.Context, *agentv1.ResumeContainerRequest) (*agentv1.ResumeContainerResponse, error) {
	return &agentv1.ResumeContainerResponse{}, nil
}

func (a *fakeAgent) WaitProcess(ctx context.Context, r *agentv1.WaitProcessRequest) (*agentv1.WaitProcessResponse, error) {
	select {
	case <-a.end(r.GetContainerId()):
		return &agentv1.WaitProcessResponse{ExitStatus: statusLost}, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (a *fakeAgent) SignalProcess(_ context.Context, r *agentv1.SignalProcessRequest) (*agentv1.SignalProcessResponse, error) {
	ended := a.end(r.GetContainerId())
	a.mu.Lock()
	defer a.mu.Unlock()
	select {
	case <-ended:
	default:
		close(ended)
	}
	return &agentv1.SignalProcessResponse{}, nil
}

func (a *fakeAgent) DeleteProcess(_ context.Context, r *agentv1.DeleteProcessRequest) (*agentv1.DeleteProcessResponse, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.deleted = append(a.deleted, r.GetContainerId())
	return &agentv1.DeleteProcessResponse{}, nil
}

func (a *fakeAgent) Shutdown(context.Context, *agentv1.ShutdownRequest) (*agentv1.ShutdownResponse, error) {
	return &agentv1.ShutdownResponse{}, nil
}

func (a *fakeAgent) NextEvents(ctx context.Context, _ *agentv1.NextEventsRequest) (*agentv1.NextEventsResponse, error) {
	<-ctx.Done()
	return nil, ctx.Err()
}

// fakeVM is a VM that is there until it is stopped.
type fakeVM struct {
	hypervisor.VM
	stop sync.Once
	done chan struct{}
}

func (v *fakeVM) PID() int              { return 4711 }
func (v *fakeVM) Done() <-chan struct{} { return v.done }
func (v *fakeVM) Stop(context.Context) error {
	v.stop.Do(func() { close(v.done) })
	return nil
}
func (v *fakeVM) Exit() hypervisor.Exit { return hypervisor.Exit{Reason: hypervisor.ExitStopped} }

// connections is a listener of those that it is given, and a transport that gives it the guest's ends.
type connections struct {
	vsock.Transport
	address  string
	accepted chan net.Conn
	closing  sync.Once
	closed   chan struct{}
}

func (c *connections) Accept() (net.Conn, error) {
	select {
	case conn := <-c.accepted:
		return conn, nil
	case <-c.closed:
		return nil, net.ErrClosed
	}
}

func (c *connections) Close() error {
	c.closing.Do(func() { close(c.closed) })
	return nil
}

func (c *connections) Addr() net.Addr { return &net.UnixAddr{Name: c.address} }

// Dial connects to the agent's service, or to a stream that takes what is written.
func (c *connections) Dial(_ context.Context, port uint32) (vsock.Conn, error) {
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: c.address})
	if err != nil {
		return nil, err
	}
	defer l.Close()
	conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: c.address})
	if err != nil {
		return nil, err
	}
	other, err := l.Accept()
	if err != nil {
		return nil, err
	}
	go func() {
		if _, err := wire.ReadToken(other); err != nil {
			_ = other.Close()
			return
		}
		if port == wire.RPCPort {
			_, _ = other.Write([]byte{wire.Accepted})
			c.accepted <- other
			return
		}
		defer other.Close()
		if _, err := wire.ReadStreamID(other); err == nil {
			_, _ = other.Write([]byte{wire.Accepted})
			_, _ = io.Copy(io.Discard, other)
		}
	}()
	return conn, nil
}

func connect(t *testing.T, agent agentv1.AgentService) *guest.Client {
	t.Helper()
	dir := t.TempDir()
	c := &connections{address: filepath.Join(dir, "rpc"), accepted: make(chan net.Conn, 2), closed: make(chan struct{})}
	server, err := ttrpc.NewServer()
	require.NoError(t, err)
	agentv1.RegisterAgentService(server, agent)
	served := make(chan error, 1)
	go func() { served <- server.Serve(context.Background(), c) }()
	t.Cleanup(func() {
		_ = server.Close()
		_ = c.Close()
		<-served
	})
	ready, err := net.Listen("unix", filepath.Join(dir, "ready"))
	require.NoError(t, err)
	go func() {
		conn, err := net.Dial("unix", filepath.Join(dir, "ready"))
		if err == nil && wire.WriteFrame(conn, &agentv1.Hello{ProtocolMajor: wire.Major, AgentVersion: "v1"}) == nil &&
			wire.ReadFrame(conn, &agentv1.HelloReply{}) == nil {
			c.accepted <- conn
		}
	}()
	client, err := guest.Accept(t.Context(), c, ready, time.Minute, func(*agentv1.Hello) error { return nil })
	require.NoError(t, err)
	t.Cleanup(client.Close)
	return client
}

// startedPod is a pod as Start leaves it, before it is ready.
func startedPod(t *testing.T, agent agentv1.AgentService) (*Pod, *running) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("makes containers' stand-ins: needs root")
	}
	netns, err := os.Open("/proc/self/ns/net")
	require.NoError(t, err)
	t.Cleanup(func() { _ = netns.Close() })
	root, err := standin.OpenRoot(t.TempDir())
	require.NoError(t, err)
	t.Cleanup(func() { _ = root.Close() })
	timeouts := configs.Timeouts{CreateContainer: time.Minute, Cleanup: time.Minute, Stop: time.Minute, Hotplug: time.Minute}
	cache, err := rootfs.OpenCache(t.TempDir(), 1<<20)
	require.NoError(t, err)
	cfg := testConfig(tee.None)
	cfg.Timeouts = timeouts
	plan := testPlan(t, cfg)
	life, endLife := context.WithCancel(context.Background())
	p := &Pod{
		cfg: PodConfig{ID: "p", Config: cfg}, plan: plan, sharing: plan.Sharing(), rootfs: cache,
		created: time.Now(), life: life, endLife: endLife, ending: make(chan struct{}), done: make(chan struct{}),
		cleanup: undo{budget: time.Minute}, state: PodStarting, containers: map[string]*Container{},
	}
	r := &running{
		vm: &fakeVM{done: make(chan struct{})}, guest: connect(t, agent), network: &network.Network{},
		netns: netns, standInRoot: root,
		document: &hypervisor.Document{CPU: hypervisor.CPU{Count: 1}, Memory: hypervisor.Memory{Bytes: 1 << 30}},
	}
	r.mark("start")
	p.attachable(r)
	return p, r
}

// readyPod is a pod that is ready, without the goroutines that watch it.
func readyPod(t *testing.T, agent agentv1.AgentService) *Pod {
	t.Helper()
	p, r := startedPod(t, agent)
	p.mu.Lock()
	defer p.mu.Unlock()
	p.running = r
	require.NoError(t, p.moveLocked(PodReady))
	t.Cleanup(func() { require.NoError(t, p.Stop(context.Background())) })
	return p
}

// noLayers is a root filesystem of the guest's own alone, as the erofs snapshotter asks for it.
var noLayers = []*types.Mount{
	{Type: "mkfs/ext4", Source: "/rw.img", Options: []string{"X-containerd.mkfs.size=1GiB", "rw", "loop"}},
	{
		Type: "format/mkdir/bind", Source: "{{ mount 0 }}/upper",
		Options: []string{"X-containerd.mkdir.path={{ mount 0 }}/upper:0755", "rw", "rbind"},
	},
}
