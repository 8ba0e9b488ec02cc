// SPDX-License-Identifier: Apache-2.0

package hybrid

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"strconv"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/errdefs"

	"github.com/cloister-project/cloister/hypervisor/vsock"
)

const (
	// maxSocketPath is the length of the longest path of a unix socket (sun_path, less the final zero).
	maxSocketPath = 107
	// firstGuestCID is the lowest context id of a guest; 0 to 2 are reserved.
	firstGuestCID = 3
	// maxConns is how many connections of one VM are open at a time, so that a guest cannot use up this process's files.
	maxConns = 1024
)

// errTooMany ends a connection above maxConns.
var errTooMany = fmt.Errorf("the VM has %d vsock connections already: %w", maxConns, errdefs.ErrResourceExhausted)

// Transport is the vsock.Transport to the guest behind one device's socket.
type Transport struct {
	socket string
	cid    uint32

	ctx  context.Context // ends with Close
	stop context.CancelFunc

	mu        sync.Mutex
	conns     map[*conn]struct{}
	listeners map[uint32]*listener
	closed    bool
}

var _ vsock.Transport = (*Transport)(nil)

// New returns the transport of the device that serves, or will serve, the socket; cid is the guest's context id. It fails
// with errdefs.ErrInvalidArgument for a path that leaves no room for "_" and a port.
func New(socket string, cid uint32) (*Transport, error) {
	if n := len(socketOf(socket, math.MaxUint32)); socket == "" || n > maxSocketPath {
		return nil, fmt.Errorf("vsock socket %q: with the port its path has %d bytes, 1 to %d are possible; choose a shorter "+
			"state directory: %w", socket, n, maxSocketPath, errdefs.ErrInvalidArgument)
	}
	if cid < firstGuestCID || cid == math.MaxUint32 {
		return nil, fmt.Errorf("vsock context id %d for a guest: %d to %d are possible: %w",
			cid, firstGuestCID, uint32(math.MaxUint32-1), errdefs.ErrInvalidArgument)
	}
	t := &Transport{socket: socket, cid: cid, conns: make(map[*conn]struct{}), listeners: make(map[uint32]*listener)}
	t.ctx, t.stop = context.WithCancel(context.Background())
	return t, nil
}

func socketOf(socket string, port uint32) string {
	return socket + "_" + strconv.FormatUint(uint64(port), 10)
}

// Dial implements vsock.Transport. The VMM takes connections from its socket once the guest's driver is up; until then they
// wait in the socket's queue. Without a VMM behind the socket the error is errdefs.ErrUnavailable.
func (t *Transport) Dial(ctx context.Context, port uint32) (vsock.Conn, error) {
	c, err := t.dial(ctx, port)
	if err != nil {
		return nil, fmt.Errorf("dial vsock port %d of the guest with context id %d: %w", port, t.cid, err)
	}
	return c, nil
}

func (t *Transport) dial(ctx context.Context, port uint32) (_ vsock.Conn, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(t.ctx, cancel)()
	// The reason for the end of ctx is what the caller wants to know, not how the socket saw it.
	defer func() {
		switch {
		case err == nil:
		case t.ctx.Err() != nil:
			err = net.ErrClosed
		case ctx.Err() != nil:
			err = ctx.Err()
		}
	}()
	nc, err := (&net.Dialer{}).DialContext(ctx, "unix", t.socket)
	if err != nil {
		return nil, fmt.Errorf("no VMM takes connections there (%w): %w", err, errdefs.ErrUnavailable)
	}
	c := t.newConn(nc.(*net.UnixConn), vsock.Addr{CID: vsock.HostCID}, vsock.Addr{CID: t.cid, Port: port})
	if err := t.keep(c); err != nil {
		return nil, errors.Join(err, c.Close())
	}
	expired := make(chan struct{})
	release := context.AfterFunc(ctx, func() {
		defer close(expired)
		_ = c.SetDeadline(time.Unix(1, 0))
	})
	err = connect(c, port)
	if !release() {
		<-expired
		err = ctx.Err()
	}
	if err != nil {
		return nil, errors.Join(err, c.Close())
	}
	return c, nil
}

// connect asks for a port and reads the answer.
func connect(c io.ReadWriter, port uint32) error {
	if _, err := fmt.Fprintf(c, "CONNECT %d\n", port); err != nil {
		if errors.Is(err, syscall.EPIPE) || errors.Is(err, syscall.ECONNRESET) {
			return fmt.Errorf("%w (%w)", vsock.ErrRefused, err)
		}
		return err
	}
	return readAnswer(c)
}

// Listen implements vsock.Transport.
func (t *Transport) Listen(port uint32) (net.Listener, error) {
	l := &listener{t: t, port: port}
	if err := t.reserve(l); err != nil {
		return nil, fmt.Errorf("listen on vsock port %d: %w", port, err)
	}
	ul, err := net.ListenUnix("unix", &net.UnixAddr{Name: socketOf(t.socket, port), Net: "unix"})
	if err != nil {
		t.forget(l)
		if errors.Is(err, syscall.EADDRINUSE) {
			err = fmt.Errorf("%w: %w", err, errdefs.ErrAlreadyExists)
		}
		return nil, fmt.Errorf("listen on vsock port %d: %w", port, err)
	}
	// Close of the transport may have come in between: it finds the socket, or this does.
	if !l.bind(ul) {
		return nil, fmt.Errorf("listen on vsock port %d: %w", port, errors.Join(net.ErrClosed, ul.Close()))
	}
	return l, nil
}

// reserve makes the port the listener's.
func (t *Transport) reserve(l *listener) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return net.ErrClosed
	}
	if t.listeners[l.port] != nil {
		return fmt.Errorf("another listener of this VM has it: %w", errdefs.ErrAlreadyExists)
	}
	t.listeners[l.port] = l
	return nil
}

func (t *Transport) forget(l *listener) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.listeners[l.port] == l {
		delete(t.listeners, l.port)
	}
}

func (t *Transport) keep(c *conn) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	switch {
	case t.closed:
		return net.ErrClosed
	case len(t.conns) >= maxConns:
		return errTooMany
	}
	t.conns[c] = struct{}{}
	return nil
}

func (t *Transport) drop(c *conn) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.conns, c)
}

// Close implements vsock.Transport. The device's own socket is the VMM's.
func (t *Transport) Close() error {
	t.stop()
	t.mu.Lock()
	conns, listeners := t.conns, t.listeners
	t.conns, t.listeners, t.closed = nil, nil, true
	t.mu.Unlock()
	var errs []error
	for _, l := range listeners {
		errs = append(errs, l.Close())
	}
	for c := range conns {
		errs = append(errs, c.Close())
	}
	return errors.Join(errs...)
}
