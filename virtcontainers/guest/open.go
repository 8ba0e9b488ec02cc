// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"syscall"
	"time"

	"github.com/cloister-project/cloister/agent-protocol/wire"
	"github.com/cloister-project/cloister/hypervisor/vsock"
)

// openAttempts bounds how often a connection is tried that the agent hangs up on. It hangs up on the oldest of those that
// have not proved themselves yet when there are too many: with the kernel's vsock, other processes of the host can make them.
const openAttempts = 5

// open connects to a port of the agent and lets opening prove there that the connection is the shim's.
func (c *Client) open(ctx context.Context, port uint32, opening func(io.ReadWriter) error) (conn vsock.Conn, err error) {
	for range openAttempts {
		if conn, err = c.transport.Dial(ctx, port); err != nil {
			return nil, fmt.Errorf("connect to the agent: %w", err)
		}
		stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
		err = opening(conn)
		if !stop() && err == nil {
			err = ctx.Err()
		}
		if err == nil {
			return conn, nil
		}
		_ = conn.Close()
		if ended := ctx.Err(); ended != nil {
			return nil, fmt.Errorf("%w: %w", ended, err)
		}
		if !hungUp(err) {
			break
		}
	}
	return nil, err
}

// hungUp reports whether an error of an opening means that the agent closed the connection without an answer.
func hungUp(err error) bool {
	return errors.Is(err, io.EOF) || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE)
}

// openRPC opens a further connection for calls.
func (c *Client) openRPC(ctx context.Context) (vsock.Conn, error) {
	return c.open(ctx, wire.RPCPort, func(rw io.ReadWriter) error { return wire.OpenRPC(rw, c.token) })
}

// openStream opens one stdio stream.
func (c *Client) openStream(ctx context.Context) (vsock.Conn, wire.StreamID, error) {
	var id wire.StreamID
	conn, err := c.open(ctx, wire.StreamPort, func(rw io.ReadWriter) error {
		id = wire.NewStreamID() // one that the agent knows already is refused
		return wire.OpenStream(rw, c.token, id)
	})
	return conn, id, err
}
