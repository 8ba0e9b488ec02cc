// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"
	"google.golang.org/grpc/status"

	agentv1 "github.com/cloister-project/cloister/agent-protocol/v1"
	"github.com/cloister-project/cloister/agent-protocol/wire"
	"github.com/cloister-project/cloister/hypervisor/vsock"
)

// Client is the connection to one agent.
type Client struct {
	transport vsock.Transport
	// token proves to the agent that a connection is this client's.
	token wire.Token
	// rpc is for calls, waits for those that wait.
	rpc, waits agentv1.AgentService
	hello      *agentv1.Hello
	// timeout bounds one call that is answered at once.
	timeout time.Duration
	// lost is why there is no guest; nil for a client that was connected.
	lost error

	connections []*ttrpc.Client
	closing     sync.Once
}

// Accept waits for the agent's ready connection on the listener, shakes hands and opens the second connection. What the
// agent says of itself is refused with check's error; the agent is told as well. A guest that does not want to run is
// a *RefusalError. timeout bounds each call that is answered at once.
func Accept(ctx context.Context, transport vsock.Transport, ready net.Listener, timeout time.Duration, check func(*agentv1.Hello) error) (
	*Client, error) {
	conn, err := acceptContext(ctx, ready)
	if err != nil {
		return nil, err
	}
	token := wire.NewToken()
	hello, err := shakeHands(conn, token, check)
	if err != nil {
		_ = conn.Close()
		return nil, err
	}
	c := &Client{transport: transport, token: token, hello: hello, timeout: timeout}
	c.rpc = c.connect(conn)
	second, err := c.openRPC(ctx)
	if err != nil {
		c.Close()
		return nil, fmt.Errorf("the second connection to the agent: %w", err)
	}
	c.waits = c.connect(second)
	return c, nil
}

func (c *Client) connect(conn net.Conn) agentv1.AgentService {
	client := ttrpc.NewClient(conn)
	c.connections = append(c.connections, client)
	return agentv1.NewAgentClient(client)
}

// Lost returns a client of a guest that is not there: every call returns err.
func Lost(err error) *Client { return &Client{lost: err} }

// Err returns why there is no guest, nil for a client that was connected.
func (c *Client) Err() error { return c.lost }

// Hello is what the agent said of itself in the handshake.
func (c *Client) Hello() *agentv1.Hello { return c.hello }

// Close ends both connections.
func (c *Client) Close() {
	c.closing.Do(func() {
		for _, one := range c.connections {
			_ = one.Close()
		}
	})
}

// method is one call of the agent's service.
type method[Req, Resp any] func(agentv1.AgentService, context.Context, Req) (Resp, error)

// call makes a call that is answered at once: the client's time limit ends it.
func call[Req, Resp any](ctx context.Context, c *Client, m method[Req, Resp], req Req) (Resp, error) {
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	return callLong(ctx, c, m, req)
}

// callLong makes a call that takes as long as ctx lets it.
func callLong[Req, Resp any](ctx context.Context, c *Client, m method[Req, Resp], req Req) (Resp, error) {
	return do(ctx, c, c.rpc, m, req)
}

// callWaiting makes a call that waits for something to happen in the guest.
func callWaiting[Req, Resp any](ctx context.Context, c *Client, m method[Req, Resp], req Req) (Resp, error) {
	return do(ctx, c, c.waits, m, req)
}

// do makes one call and turns its status into an errdefs kind.
func do[Req, Resp any](ctx context.Context, c *Client, service agentv1.AgentService, m method[Req, Resp], req Req) (Resp, error) {
	if c.lost != nil {
		var none Resp
		return none, c.lost
	}
	resp, err := m(service, ctx, req)
	if err != nil {
		return resp, errorOf(err)
	}
	return resp, nil
}

// errorOf turns an RPC's error into an errdefs kind; a lost connection becomes ErrUnavailable.
func errorOf(err error) error {
	if errors.Is(err, ttrpc.ErrClosed) || errors.Is(err, net.ErrClosed) {
		return fmt.Errorf("the connection to the guest is gone: %w", errdefs.ErrUnavailable)
	}
	s, ok := status.FromError(err)
	if !ok {
		return errgrpc.ToNative(err)
	}
	// The code and bounded words are all that is taken from a guest: details would be unpacked, whatever they nest.
	return errgrpc.ToNative(status.Error(s.Code(), text(s.Message())))
}
