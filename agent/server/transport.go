// SPDX-License-Identifier: Apache-2.0

package server

import (
	"context"
	"errors"
	"fmt"
	"net"

	"github.com/mdlayher/vsock"
	"golang.org/x/sys/unix"

	"github.com/cloister-project/cloister/agent-protocol/wire"
)

// Transport is how the agent and the host reach each other: vsock in a guest, unix sockets in tests.
type Transport interface {
	// Listen accepts connections of the host, and only of the host, on a port of wire; of any process there.
	Listen(port uint32) (net.Listener, error)
	// DialReady connects to the host's ready port (wire.ReadyPort).
	DialReady(ctx context.Context) (net.Conn, error)
}

// Vsock is the guest's vsock device.
func Vsock() Transport { return vsockTransport{} }

type vsockTransport struct{}

func (vsockTransport) DialReady(ctx context.Context) (net.Conn, error) {
	cid, err := vsock.ContextID()
	if err != nil {
		return nil, fmt.Errorf("find the guest's vsock context id: %w", err)
	}
	port := wire.ReadyPort(cid)
	conn, err := vsock.DialContext(ctx, vsock.Host, port, nil)
	if err != nil {
		return nil, fmt.Errorf("dial the host's vsock port %d: %w", port, err)
	}
	return conn, nil
}

func (vsockTransport) Listen(port uint32) (net.Listener, error) {
	// Not vsock.Listen, which asks for the guest's own CID: that can change when a VM is restored.
	l, err := vsock.ListenContextID(unix.VMADDR_CID_ANY, port, nil)
	if err != nil {
		return nil, fmt.Errorf("listen on vsock port %d: %w", port, err)
	}
	return &hostListener{Listener: l}, nil
}

// hostListener drops connections that come from elsewhere: with the loopback transport in the kernel, a container's
// process could connect from the guest itself. That the rest comes from the shim is for gate to find out.
type hostListener struct {
	net.Listener
	refused tally
}

func (l *hostListener) Accept() (net.Conn, error) {
	for {
		conn, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		if from, ok := conn.RemoteAddr().(*vsock.Addr); ok && from.ContextID == vsock.Host {
			return conn, nil
		}
		_ = conn.Close()
		l.refused.warn("refused vsock connections that are not the host's", fmt.Errorf("from %s", conn.RemoteAddr()))
	}
}

// feed is a net.Listener whose connections come from a channel.
type feed struct {
	conns chan net.Conn
	done  <-chan struct{}
}

func (f *feed) Accept() (net.Conn, error) {
	select {
	case c := <-f.conns:
		return c, nil
	case <-f.done:
		return nil, net.ErrClosed
	}
}

func (f *feed) Close() error   { return nil }
func (f *feed) Addr() net.Addr { return &vsock.Addr{} }

// put hands a connection to the listener's user, or closes it if there is none any more.
func (f *feed) put(c net.Conn) {
	select {
	case f.conns <- c:
	case <-f.done:
		_ = c.Close()
	}
}

// watchedConn calls ended once, when reading fails or the connection is closed.
type watchedConn struct {
	net.Conn
	ended func()
}

func (c *watchedConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if err != nil {
		c.ended()
	}
	return n, err
}

func (c *watchedConn) Close() error {
	c.ended()
	return c.Conn.Close()
}

// isClosed reports whether an error of Accept means the end of the listener.
func isClosed(err error) bool { return errors.Is(err, net.ErrClosed) || errors.Is(err, unix.EINVAL) }
