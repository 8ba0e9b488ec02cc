// SPDX-License-Identifier: Apache-2.0

package server

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/containerd/log"
	"github.com/containerd/ttrpc"
	"golang.org/x/sys/unix"

	agentv1 "github.com/cloister-project/cloister/agent-protocol/v1"
	"github.com/cloister-project/cloister/agent-protocol/wire"
	"github.com/cloister-project/cloister/agent/container"
)

const (
	// handshakeBudget bounds Hello and its answer, headerBudget what a connection begins with.
	handshakeBudget = 30 * time.Second
	headerBudget    = 10 * time.Second
	// closeBudget bounds the end of all containers.
	closeBudget = 10 * time.Second
	// lastWords is how long after the answer to Shutdown the guest stays up if the host does not hang up.
	lastWords = 250 * time.Millisecond
	// acceptPause keeps a failing accept (no descriptors left) from spinning.
	acceptPause = 100 * time.Millisecond

	// maxConns bounds the shim's ttrpc connections, maxHeaders its stream connections that have not named themselves yet.
	maxConns   = 32
	maxHeaders = 128
)

// System is what the server asks of the guest (package agent/boot).
type System interface {
	Timeline() []*agentv1.BootMark
	SetClock(unixNanos int64) error
	SetHostname(name string) error
	OnlineCPUs(ctx context.Context, count int) error
	SetSysctls(values map[string]string) error
	PowerOff()
}

// Storage is what the server asks of the guest's storage (package agent/storage).
type Storage interface {
	container.Storage
	SetupShm(bytes uint64) error
	SetupScratch(serial string) error
	Usage(out *agentv1.SandboxStatsResponse)
	MountShared(ctx context.Context, tag string) error
	PutVolume(ctx context.Context, r *agentv1.PutVolumeRequest) error
}

// Config is what a Server works with.
type Config struct {
	System  System
	Storage Storage
	// Network sets up the pod's network (package agent/network).
	Network func(ctx context.Context, n *agentv1.Network) error
	// Transport is Vsock() in a guest.
	Transport Transport
	// StateDir is a directory on tmpfs for the state of containers.
	StateDir string
	// Cgroup is the parent of the containers' cgroups, container.DefaultCgroup if empty.
	Cgroup string
	// Version is that of the build, for people.
	Version string
	// Platform that the guest was launched on, as package tee names it; empty for an ordinary VM.
	Platform string
	// Initdata is the digest of the document that the launch is bound to, "sha384:HEX"; empty if there is none.
	Initdata string
}

// Server serves the agent protocol.
type Server struct {
	cfg     Config
	streams *container.Streams
	manager *container.Manager
	// forwards are connections to ports of the guest's loopback.
	forwards forwards
	// stop ends Run with a reason.
	stop context.CancelCauseFunc
	// hungUp is closed when the ready connection has ended.
	hungUp chan struct{}
}

// Reasons for the end of Run.
var (
	errShutdown = errors.New("the host asked for the shutdown")
	errHungUp   = errors.New("the host closed the ready connection")
)

// New makes a server. Nothing happens before Run.
func New(cfg Config) *Server {
	return &Server{cfg: cfg, streams: container.NewStreams(), hungUp: make(chan struct{})}
}

// Run serves the host until it asks for the shutdown (then it returns nil), hangs up, or ctx ends. Before it returns it
// powers the guest off, which in a guest means that it does not return.
func (s *Server) Run(ctx context.Context) error {
	defer s.cfg.System.PowerOff()
	ctx, s.stop = context.WithCancelCause(ctx)
	defer s.stop(nil)
	err := s.run(ctx)
	if errors.Is(err, errShutdown) {
		return nil
	}
	log.G(ctx).WithError(err).Error("the agent ends, the guest powers off")
	return err
}

func (s *Server) run(ctx context.Context) (err error) {
	if s.manager, err = container.NewManager(container.Config{StateDir: s.cfg.StateDir, Storage: s.cfg.Storage, Streams: s.streams,
		Cgroup: s.cfg.Cgroup}); err != nil {
		return err
	}
	defer func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), closeBudget)
		defer cancel()
		s.manager.Close(ctx)
	}()
	// Listen before Hello: the host may connect as soon as it has read it.
	rpcs, err := s.cfg.Transport.Listen(wire.RPCPort)
	if err != nil {
		return err
	}
	defer rpcs.Close()
	streams, err := s.cfg.Transport.Listen(wire.StreamPort)
	if err != nil {
		return err
	}
	defer streams.Close()
	ready, token, err := s.hello(ctx)
	if err != nil {
		return err
	}
	gate := &gate{token: token}
	server, err := ttrpc.NewServer(ttrpc.WithUnaryServerInterceptor(guard))
	if err != nil {
		_ = ready.Close()
		return err
	}
	agentv1.RegisterAgentService(server, &service{s})

	conns := &feed{conns: make(chan net.Conn), done: ctx.Done()}
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := server.Serve(ctx, conns); err != nil && !errors.Is(err, ttrpc.ErrServerClosed) && !isClosed(err) {
			s.stop(fmt.Errorf("serve ttrpc: %w", err))
		}
	})
	conns.put(&watchedConn{Conn: ready, ended: sync.OnceFunc(func() {
		close(s.hungUp)
		s.stop(errHungUp)
	})})
	wg.Go(func() { s.acceptRPCs(ctx, rpcs, gate, conns) })
	wg.Go(func() { s.acceptStreams(ctx, streams, gate) })

	<-ctx.Done()
	_ = rpcs.Close()
	_ = streams.Close()
	gate.close()
	_ = ready.Close()
	_ = server.Close()
	wg.Wait()
	return context.Cause(ctx)
}

// dialHost connects to the host's ready port; the connection has the handshake's deadline.
func (s *Server) dialHost(ctx context.Context) (net.Conn, error) {
	conn, err := s.cfg.Transport.DialReady(ctx)
	if err != nil {
		return nil, fmt.Errorf("tell the host that the guest is ready: %w", err)
	}
	deadline, _ := ctx.Deadline()
	if err := conn.SetDeadline(deadline); err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	return conn, nil
}

func (s *Server) newHello() *agentv1.Hello {
	return &agentv1.Hello{
		ProtocolMajor: wire.Major,
		ProtocolMinor: wire.Minor,
		AgentVersion:  s.cfg.Version,
		KernelRelease: kernelRelease(),
		BootId:        bootID(),
		BootTimeline:  s.cfg.System.Timeline(),
		Tee:           s.cfg.Platform,
		Initdata:      s.cfg.Initdata,
	}
}

// maxRefusal bounds the reason that Refuse tells, bytes.
const maxRefusal = 4 << 10

// Refuse tells the host why the guest does not go on. It returns when the host has heard it and hung up, or after some
// time; the caller powers the guest off.
func (s *Server) Refuse(ctx context.Context, reason error) error {
	ctx, cancel := context.WithTimeout(ctx, handshakeBudget)
	defer cancel()
	conn, err := s.dialHost(ctx)
	if err != nil {
		return err
	}
	defer conn.Close()
	hello := s.newHello()
	// Protobuf sends valid UTF-8 only; the host must hear the reason whatever it quotes.
	words := reason.Error()
	hello.Refusal = strings.ToValidUTF8(words[:min(len(words), maxRefusal)], "?")
	if hello.Refusal == "" {
		hello.Refusal = "the reason is not known" // an empty one would be none
	}
	if err := wire.WriteFrame(conn, hello); err != nil {
		return fmt.Errorf("tell the host why the guest ends: %w", err)
	}
	// The host answers and closes; whatever it says changes nothing.
	_, err = io.Copy(io.Discard, io.LimitReader(conn, wire.MaxFrame))
	return err
}

// hello dials the host, exchanges versions and gets the launch's token.
func (s *Server) hello(ctx context.Context) (_ net.Conn, token wire.Token, err error) {
	ctx, cancel := context.WithTimeout(ctx, handshakeBudget)
	defer cancel()
	conn, err := s.dialHost(ctx)
	if err != nil {
		return nil, token, err
	}
	defer func() {
		if err != nil {
			_ = conn.Close()
			err = fmt.Errorf("handshake with the host: %w", err)
		}
	}()
	hello := s.newHello()
	if err := wire.WriteFrame(conn, hello); err != nil {
		return nil, token, err
	}
	var reply agentv1.HelloReply
	if err := wire.ReadFrame(conn, &reply); err != nil {
		return nil, token, err
	}
	switch {
	case reply.GetError() != "":
		return nil, token, fmt.Errorf("the host refuses this agent (version %s, protocol %d.%d): %q", s.cfg.Version, wire.Major, wire.Minor,
			reply.GetError())
	case reply.GetProtocolMajor() != wire.Major:
		return nil, token, fmt.Errorf("the shim (version %q) speaks protocol %d.%d, this agent (version %s) %d.%d: "+
			"use a guest image of the shim's release",
			reply.GetShimVersion(), reply.GetProtocolMajor(), reply.GetProtocolMinor(), s.cfg.Version, wire.Major, wire.Minor)
	}
	if token, err = wire.ParseToken(reply.GetToken()); err != nil {
		return nil, token, err
	}
	if nanos := reply.GetUnixNanos(); nanos != 0 {
		if err := s.cfg.System.SetClock(nanos); err != nil {
			// The guest has the time of its machine's clock, more or less.
			log.G(ctx).WithError(err).Warn("cannot set the clock to the host's time")
		}
	}
	return conn, token, conn.SetDeadline(time.Time{})
}

// accept calls handle, in a goroutine, for each connection that the gate lets through, until the listener is closed. It
// holds at most limit of them at a time, until their release is called.
func (s *Server) accept(ctx context.Context, l net.Listener, g *gate, limit int, handle func(conn net.Conn, release func())) {
	var wg sync.WaitGroup
	defer wg.Wait()
	free := make(chan struct{}, limit)
	for {
		conn, err := l.Accept()
		if err != nil {
			if ctx.Err() != nil || isClosed(err) {
				return
			}
			log.G(ctx).WithError(err).Warn("accept a connection")
			select {
			case <-time.After(acceptPause):
			case <-ctx.Done():
			}
			continue
		}
		g.enter(conn)
		wg.Go(func() {
			if g.prove(conn) != nil {
				return
			}
			select {
			case free <- struct{}{}:
				handle(conn, sync.OnceFunc(func() { <-free }))
			default:
				log.G(ctx).WithField("limit", limit).Warn("refused a connection: too many are open")
				refuse(conn)
			}
		})
	}
}

// refuse answers to an opening with no.
func refuse(conn net.Conn) {
	_, _ = conn.Write([]byte{wire.Refused})
	_ = conn.Close()
}

func (s *Server) acceptRPCs(ctx context.Context, l net.Listener, g *gate, conns *feed) {
	s.accept(ctx, l, g, maxConns, func(conn net.Conn, release func()) {
		conn = &watchedConn{Conn: conn, ended: release}
		_, err := conn.Write([]byte{wire.Accepted})
		if err == nil {
			err = conn.SetDeadline(time.Time{})
		}
		if err != nil {
			log.G(ctx).WithError(err).Warn("answer to the opening of a connection")
			_ = conn.Close()
			return
		}
		conns.put(conn)
	})
}

func (s *Server) acceptStreams(ctx context.Context, l net.Listener, g *gate) {
	s.accept(ctx, l, g, maxHeaders, func(conn net.Conn, release func()) {
		defer release()
		if err := s.takeStream(conn); err != nil {
			log.G(ctx).WithError(err).Warn("refused a stdio stream")
			refuse(conn)
		}
	})
}

// takeStream reads a stream's id and hands the stream over. With an error the caller keeps the connection.
func (s *Server) takeStream(conn net.Conn) error {
	id, err := wire.ReadStreamID(conn)
	if err != nil {
		return fmt.Errorf("read the stream's id: %w", err)
	}
	if err := conn.SetDeadline(time.Time{}); err != nil {
		return err
	}
	// First the registry, then the answer: when the host has read it, StartProcess finds the stream. The host does not
	// start the process before, so nothing overtakes this byte.
	if err := s.streams.Offer(id, conn); err != nil {
		return err
	}
	if _, err := conn.Write([]byte{wire.Accepted}); err != nil {
		// The connection is the registry's now, and broken: it is dropped when nobody asks for it.
		log.L.WithError(err).Warn("answer to the opening of a stdio stream")
	}
	return nil
}

func kernelRelease() string {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return ""
	}
	return unix.ByteSliceToString(u.Release[:])
}

func bootID() string {
	raw, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(raw))
}
