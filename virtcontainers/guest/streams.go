// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"context"

	agentv1 "github.com/cloister-project/cloister/agent-protocol/v1"
	"github.com/cloister-project/cloister/hypervisor/vsock"
)

// Stdio says which streams a process has.
type Stdio struct {
	Stdin, Stdout, Stderr bool
	Terminal              bool
	// Width and Height of the terminal; zero if unknown.
	Width, Height uint32
}

// Streams are the guest's ends of a process's stdio; nil for those that were not asked for.
type Streams struct {
	Stdin, Stdout, Stderr vsock.Conn
}

// Close ends all streams.
func (s *Streams) Close() {
	for _, c := range []vsock.Conn{s.Stdin, s.Stdout, s.Stderr} {
		if c != nil {
			_ = c.Close()
		}
	}
}

// OpenStdio connects the streams that stdio asks for, and returns with them what the agent is told of them.
func (c *Client) OpenStdio(ctx context.Context, stdio Stdio) (*Streams, *agentv1.Stdio, error) {
	if c.lost != nil {
		return nil, nil, c.lost
	}
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	var s Streams
	req := &agentv1.Stdio{Terminal: stdio.Terminal, Width: stdio.Width, Height: stdio.Height}
	for _, one := range []struct {
		want bool
		conn *vsock.Conn
		id   *string
	}{
		{stdio.Stdin, &s.Stdin, &req.Stdin},
		{stdio.Stdout, &s.Stdout, &req.Stdout},
		{stdio.Stderr && !stdio.Terminal, &s.Stderr, &req.Stderr},
	} {
		if !one.want {
			continue
		}
		conn, id, err := c.openStream(ctx)
		if err != nil {
			s.Close()
			return nil, nil, err
		}
		*one.conn, *one.id = conn, id.String()
	}
	return &s, req, nil
}
