// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"context"
	"fmt"
	"net"
	"time"

	"github.com/containerd/errdefs"

	agentv1 "github.com/cloister-project/cloister/agent-protocol/v1"
	"github.com/cloister-project/cloister/agent-protocol/wire"
	"github.com/cloister-project/cloister/internal/version"
)

// handshakeTime bounds the exchange of Hello and HelloReply once the agent has connected.
const handshakeTime = 10 * time.Second

// maxBootMarks bounds what is kept of the boot timeline of a hostile guest.
const maxBootMarks = 64

// RefusalError is a guest's own word that it does not go on: its launch is not what it has to be. It is an
// errdefs.ErrFailedPrecondition.
type RefusalError struct {
	words string
}

// Error quotes the guest, within bounds.
func (e *RefusalError) Error() string { return "the guest refuses to run: " + e.words }

// Unwrap returns the error's kind.
func (e *RefusalError) Unwrap() error { return errdefs.ErrFailedPrecondition }

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

// shakeHands exchanges Hello and HelloReply. An agent that is not refused gets the token.
func shakeHands(conn net.Conn, token wire.Token, check func(*agentv1.Hello) error) (*agentv1.Hello, error) {
	if err := conn.SetDeadline(time.Now().Add(handshakeTime)); err != nil {
		return nil, err
	}
	hello := &agentv1.Hello{}
	if err := wire.ReadFrame(conn, hello); err != nil {
		return nil, fmt.Errorf("read the agent's hello: %w", err)
	}
	if hello.GetRefusal() != "" {
		return nil, &RefusalError{words: sentence(hello.GetRefusal())} // it waits for no answer
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
	} else {
		reply.Token = token[:]
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
	if err := conn.SetDeadline(time.Time{}); err != nil {
		return nil, fmt.Errorf("after the agent's hello: %w", err)
	}
	return hello, nil
}

func checkVersion(hello *agentv1.Hello) error {
	if hello.GetProtocolMajor() == wire.Major {
		return nil
	}
	return fmt.Errorf("the shim (%s) speaks agent protocol %d.%d, the guest image's agent (%.64q) speaks %d.%d: "+
		"install shim and guest image of the same release: %w", version.Version, wire.Major, wire.Minor,
		hello.GetAgentVersion(), hello.GetProtocolMajor(), hello.GetProtocolMinor(), errdefs.ErrFailedPrecondition)
}
