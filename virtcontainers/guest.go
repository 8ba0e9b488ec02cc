// SPDX-License-Identifier: Apache-2.0

package virtcontainers

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"
	"google.golang.org/grpc/status"

	agentv1 "github.com/cloister-project/cloister/agent-protocol/v1"
	"github.com/cloister-project/cloister/agent-protocol/wire"
	"github.com/cloister-project/cloister/hypervisor/vsock"
	"github.com/cloister-project/cloister/internal/version"
)

// handshakeTime bounds the exchange of Hello and HelloReply once the agent has connected.
const handshakeTime = 10 * time.Second

// maxBootMarks bounds what is kept of the boot timeline that a hostile guest tells.
const maxBootMarks = 64

// guest is the connection to one agent. Two ttrpc connections are used: rpc for calls, and events for the long-polling
// NextEvents and WaitProcess, so that neither waits behind the other.
type guest struct {
	transport vsock.Transport
	rpc       agentv1.AgentService
	waits     agentv1.AgentService
	hello     *agentv1.Hello
	// timeout bounds one call that is answered at once.
	timeout time.Duration

	clients []*ttrpc.Client
	closing sync.Once
}

// acceptGuest waits for the agent's ready connection on the listener, shakes hands and opens the second connection. What
// the agent says of itself is refused with check's error.
func acceptGuest(ctx context.Context, transport vsock.Transport, ready net.Listener, timeout time.Duration, check func(*agentv1.Hello) error) (*guest, error) {
	conn, err := acceptContext(ctx, ready)
	if err != nil {
		return nil, err
	}
	hello, err := shakeHands(conn, check)
	if err != nil {
		_ = conn.Close()
		return nil, err
	}
	g := &guest{transport: transport, hello: hello, timeout: timeout}
	client := ttrpc.NewClient(conn)
	g.clients = append(g.clients, client)
	g.rpc = agentv1.NewAgentClient(client)

	second, err := transport.Dial(ctx, wire.RPCPort)
	if err != nil {
		g.close()
		return nil, fmt.Errorf("open the second connection to the agent: %w", err)
	}
	client = ttrpc.NewClient(second)
	g.clients = append(g.clients, client)
	g.waits = agentv1.NewAgentClient(client)
	return g, nil
}

// acceptContext is Accept that ends with ctx. The listener is closed in any case: the agent connects once.
func acceptContext(ctx context.Context, l net.Listener) (net.Conn, error) {
	stop := context.AfterFunc(ctx, func() { _ = l.Close() })
	conn, err := l.Accept()
	stop()
	_ = l.Close()
	if err != nil {
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		return nil, fmt.Errorf("wait for the agent: %w", err)
	}
	return conn, nil
}

func shakeHands(conn net.Conn, check func(*agentv1.Hello) error) (*agentv1.Hello, error) {
	if err := conn.SetDeadline(time.Now().Add(handshakeTime)); err != nil {
		return nil, err
	}
	hello := &agentv1.Hello{}
	if err := wire.ReadFrame(conn, hello); err != nil {
		return nil, fmt.Errorf("read the agent's hello: %w", err)
	}
	if hello.GetRefusal() != "" {
		return nil, &guestRefusal{words: sentence(hello.GetRefusal())} // it waits for no answer
	}
	reply := &agentv1.HelloReply{
		ProtocolMajor: wire.Major, ProtocolMinor: wire.Minor,
		ShimVersion: version.Version, UnixNanos: time.Now().UnixNano(),
	}
	refused := checkVersion(hello)
	if refused == nil {
		refused = check(hello)
	}
	if refused != nil {
		reply.Error = refused.Error()
	}
	if err := wire.WriteFrame(conn, reply); err != nil {
		return nil, fmt.Errorf("answer the agent's hello: %w", err)
	}
	if refused != nil {
		return nil, refused
	}
	if len(hello.BootTimeline) > maxBootMarks {
		hello.BootTimeline = hello.BootTimeline[:maxBootMarks]
	}
	return hello, conn.SetDeadline(time.Time{})
}

func checkVersion(hello *agentv1.Hello) error {
	if hello.GetProtocolMajor() == wire.Major {
		return nil
	}
	return fmt.Errorf("the shim (%s) speaks agent protocol %d.%d, the guest image's agent (%.64q) speaks %d.%d: "+
		"install shim and guest image of the same release: %w", version.Version, wire.Major, wire.Minor,
		hello.GetAgentVersion(), hello.GetProtocolMajor(), hello.GetProtocolMinor(), errdefs.ErrFailedPrecondition)
}

// call runs one RPC with the guest's time limit and turns its status into an errdefs kind.
func call[Req, Resp any](ctx context.Context, g *guest, rpc func(context.Context, Req) (Resp, error), req Req) (Resp, error) {
	ctx, cancel := context.WithTimeout(ctx, g.timeout)
	defer cancel()
	return callLong(ctx, rpc, req)
}

// callLong is call without a limit of its own, for what takes as long as the caller says.
func callLong[Req, Resp any](ctx context.Context, rpc func(context.Context, Req) (Resp, error), req Req) (Resp, error) {
	resp, err := rpc(ctx, req)
	if err != nil {
		return resp, guestError(err)
	}
	return resp, nil
}

// guestError turns an RPC's error into an errdefs kind; a lost connection becomes ErrUnavailable.
func guestError(err error) error {
	if errors.Is(err, ttrpc.ErrClosed) || errors.Is(err, net.ErrClosed) {
		return fmt.Errorf("the connection to the guest is gone: %w", errdefs.ErrUnavailable)
	}
	s, ok := status.FromError(err)
	if !ok {
		return errgrpc.ToNative(err)
	}
	// The code and bounded words are all that is taken from a guest: details would be unpacked, whatever they nest.
	return errgrpc.ToNative(status.Error(s.Code(), harmless(s.Message())))
}

// maxGuestError bounds the words of an agent's error, which may list much.
const maxGuestError = 8 << 10

// harmless bounds a guest's words and takes out what a terminal would act upon.
func harmless(s string) string {
	if len(s) > maxGuestError {
		s = s[:maxGuestError] + "..."
	}
	return strings.Map(func(r rune) rune {
		if unicode.IsControl(r) && r != '\n' && r != '\t' || r == utf8.RuneError {
			return '?'
		}
		return r
	}, s)
}

// openStream connects one stdio stream.
func (g *guest) openStream(ctx context.Context) (vsock.Conn, wire.StreamID, error) {
	id := wire.NewStreamID()
	conn, err := g.transport.Dial(ctx, wire.StreamPort)
	if err != nil {
		return nil, id, fmt.Errorf("connect a stdio stream: %w", err)
	}
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	err = wire.WriteStreamHeader(conn, id)
	if !stop() && err == nil {
		err = ctx.Err()
	}
	if err != nil {
		_ = conn.Close()
		return nil, id, err
	}
	return conn, id, nil
}

// streams are the guest's ends of a process's stdio.
type streams struct {
	stdin, stdout, stderr vsock.Conn
}

func (s *streams) close() {
	for _, c := range []vsock.Conn{s.stdin, s.stdout, s.stderr} {
		if c != nil {
			_ = c.Close()
		}
	}
}

// openStdio connects what stdio asks for.
func (g *guest) openStdio(ctx context.Context, stdio Stdio) (*streams, *agentv1.Stdio, error) {
	ctx, cancel := context.WithTimeout(ctx, g.timeout)
	defer cancel()
	var s streams
	req := &agentv1.Stdio{Terminal: stdio.Terminal, Width: stdio.Width, Height: stdio.Height}
	for _, one := range []struct {
		want bool
		conn *vsock.Conn
		id   *string
	}{
		{stdio.Stdin, &s.stdin, &req.Stdin},
		{stdio.Stdout, &s.stdout, &req.Stdout},
		{stdio.Stderr && !stdio.Terminal, &s.stderr, &req.Stderr},
	} {
		if !one.want {
			continue
		}
		conn, id, err := g.openStream(ctx)
		if err != nil {
			s.close()
			return nil, nil, err
		}
		*one.conn, *one.id = conn, id.String()
	}
	return &s, req, nil
}

// watchEvents calls handle for each event until ctx ends, or the connection (the error says so).
func (g *guest) watchEvents(ctx context.Context, handle func(*agentv1.Event)) error {
	var after uint64
	for {
		resp, err := g.waits.NextEvents(ctx, &agentv1.NextEventsRequest{After: after})
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return fmt.Errorf("the connection to the agent broke: %w", guestError(err))
		}
		progress := false
		for _, e := range resp.GetEvents() {
			if e.GetSequence() <= after {
				continue
			}
			after, progress = e.GetSequence(), true
			handle(e)
		}
		if !progress {
			// An agent that answers without news would make this loop spin.
			return fmt.Errorf("the agent answered NextEvents without a new event: %w", errdefs.ErrInvalidArgument)
		}
	}
}

// close ends both connections.
func (g *guest) close() {
	g.closing.Do(func() {
		for _, c := range g.clients {
			_ = c.Close()
		}
	})
}
