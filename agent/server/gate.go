// SPDX-License-Identifier: Apache-2.0

package server

import (
	"errors"
	"fmt"
	"net"
	"slices"
	"sync"
	"time"

	"github.com/containerd/log"

	"github.com/cloister-project/cloister/agent-protocol/wire"
)

// maxUnproven bounds the connections that have not proved yet that they are the shim's.
const maxUnproven = 64

// gate keeps out connections that do not begin with the launch's token: with the kernel's vsock every process of the host
// can make them. Each costs a goroutine until its token was read, and no more than maxUnproven are kept: a further one
// pushes out the oldest. So idle connections block nobody; the shim, which sends its token at once, tries again when a
// flood pushes it out.
type gate struct {
	token   wire.Token
	refused tally

	mu       sync.Mutex
	unproven []net.Conn // oldest first
	closed   bool
}

// errStranger is the fate of a connection without the token.
var errStranger = errors.New("the connection does not begin with the launch's token")

// enter takes a connection in, to be proved. It may close another one, or this one when the gate is closed.
func (g *gate) enter(conn net.Conn) {
	g.mu.Lock()
	var out net.Conn
	switch {
	case g.closed:
		out = conn
	case len(g.unproven) == maxUnproven:
		out = g.unproven[0]
		g.unproven = append(g.unproven[:0], g.unproven[1:]...)
		fallthrough
	default:
		g.unproven = append(g.unproven, conn)
	}
	g.mu.Unlock()
	if out != nil {
		_ = out.Close()
	}
}

// prove reads a connection's token. With an error the connection is closed, without an answer.
func (g *gate) prove(conn net.Conn) error {
	err := conn.SetDeadline(time.Now().Add(headerBudget))
	if err == nil {
		var token wire.Token
		if token, err = wire.ReadToken(conn); err == nil && !token.Equal(g.token) {
			err = errStranger
		}
	}
	g.mu.Lock()
	g.unproven = slices.DeleteFunc(g.unproven, func(c net.Conn) bool { return c == conn })
	g.mu.Unlock()
	if err != nil {
		_ = conn.Close()
		g.refused.warn("refused connections that do not begin with the launch's token", fmt.Errorf("read the token: %w", err))
	}
	return err
}

// close closes the connections that are not proved, and all later ones.
func (g *gate) close() {
	g.mu.Lock()
	left := g.unproven
	g.unproven, g.closed = nil, true
	g.mu.Unlock()
	for _, c := range left {
		_ = c.Close()
	}
}

// tally logs what others can cause as often as they like: the first time, the tenth, the hundredth and so on.
type tally struct {
	mu      sync.Mutex
	n, next uint64
}

func (t *tally) warn(what string, last error) {
	t.mu.Lock()
	t.n++
	t.next = max(t.next, 1)
	due := t.n == t.next
	if due {
		t.next *= 10
	}
	n := t.n
	t.mu.Unlock()
	if due {
		log.L.WithError(last).WithField("number", n).Warn(what)
	}
}
