// SPDX-License-Identifier: Apache-2.0

package hybrid

import (
	"net"
	"sync"

	"github.com/cloister-project/cloister/hypervisor/vsock"
)

// conn is one stream; it may be closed more than once.
type conn struct {
	*net.UnixConn
	t             *Transport
	local, remote vsock.Addr
	once          sync.Once
	err           error
}

var _ vsock.Conn = (*conn)(nil)

func (t *Transport) newConn(uc *net.UnixConn, local, remote vsock.Addr) *conn {
	return &conn{UnixConn: uc, t: t, local: local, remote: remote}
}

// LocalAddr implements net.Conn; the port is 0 where this side dialled.
func (c *conn) LocalAddr() net.Addr { return c.local }

// RemoteAddr implements net.Conn; the port is 0 where the guest dialled, since the VMM does not tell.
func (c *conn) RemoteAddr() net.Addr { return c.remote }

// Close implements net.Conn.
func (c *conn) Close() error {
	c.once.Do(func() {
		c.t.drop(c)
		c.err = c.UnixConn.Close()
	})
	return c.err
}

// listener takes the guest's connections to one port.
type listener struct {
	t    *Transport
	port uint32

	mu     sync.Mutex
	ul     *net.UnixListener // nil until bound
	closed bool
}

// bind reports whether the listener still wants its socket.
func (l *listener) bind(ul *net.UnixListener) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return false
	}
	l.ul = ul
	return true
}

// Accept implements net.Listener; it gives a vsock.Conn.
func (l *listener) Accept() (net.Conn, error) {
	for {
		uc, err := l.ul.AcceptUnix()
		if err != nil {
			return nil, err
		}
		c := l.t.newConn(uc, vsock.Addr{CID: vsock.HostCID, Port: l.port}, vsock.Addr{CID: l.t.cid})
		if l.t.keep(c) == nil {
			return c, nil
		}
		_ = c.Close() // too many; or the transport ends, and Accept with it
	}
}

// Addr implements net.Listener.
func (l *listener) Addr() net.Addr { return vsock.Addr{CID: vsock.HostCID, Port: l.port} }

// Close implements net.Listener. It is safe to repeat.
func (l *listener) Close() error {
	l.mu.Lock()
	ul, again := l.ul, l.closed
	l.closed = true
	l.mu.Unlock()
	if again {
		return nil
	}
	// The socket's file goes before somebody else gets the port.
	defer l.t.forget(l)
	if ul == nil {
		return nil
	}
	return ul.Close()
}
