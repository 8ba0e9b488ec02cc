// SPDX-License-Identifier: Apache-2.0

package vhostuser

import (
	"fmt"
	"net"

	"github.com/containerd/errdefs"

	"github.com/cloister-project/cloister/hypervisor/vsock"
)

const (
	// maxBacklog is how many connections of the guest wait to be accepted; more are refused.
	maxBacklog = 64
	// backlogBuffer is the credit of a connection that waits to be accepted, in bytes.
	backlogBuffer = 16 << 10
)

type listener struct {
	d       *Device
	port    uint32
	backlog chan *stream
	done    chan struct{} // closed by Close, or when the device ends
	err     error         // set before done is closed
}

// Listen implements vsock.Transport.
func (d *Device) Listen(port uint32) (net.Listener, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.err != nil {
		return nil, fmt.Errorf("listen on vsock port %d: %w", port, d.err)
	}
	if d.listeners[port] != nil {
		return nil, fmt.Errorf("listen on vsock port %d: another listener of this VM has it: %w", port, errdefs.ErrAlreadyExists)
	}
	l := &listener{d: d, port: port, backlog: make(chan *stream, maxBacklog), done: make(chan struct{})}
	d.listeners[port] = l
	return l, nil
}

// accept answers a REQUEST; it is false if nobody wants the connection.
func (d *Device) accept(ports portPair, h *packetHeader) bool {
	s := newStream(d, ports, stateEstablished, min(backlogBuffer, d.bufferSize))
	s.peerAlloc = h.bufAlloc
	// Pending before anybody else has the stream: Accept may be faster than the end of this function, and the guest
	// resets a connection on which anything comes before the answer.
	s.ctrl = ctrlResponse
	d.mu.Lock()
	l := d.listeners[ports.host]
	if l == nil || d.err != nil || len(d.streams) >= d.maxStreams {
		d.mu.Unlock()
		return false
	}
	select {
	case l.backlog <- s:
	default:
		d.mu.Unlock()
		return false
	}
	d.streams[ports] = s
	d.mu.Unlock()
	d.check(d.rx.post(s, 0, 0))
	return true
}

// Accept implements net.Listener; it gives a vsock.Conn.
func (l *listener) Accept() (net.Conn, error) {
	var s *stream
	select {
	case s = <-l.backlog:
	default:
		select {
		case s = <-l.backlog:
		case <-l.done:
			return nil, &net.OpError{Op: "accept", Net: "vsock", Addr: l.Addr(), Err: l.err}
		}
	}
	s.bufAlloc.Store(l.d.bufferSize)
	l.d.check(l.d.rx.post(s, ctrlCredit, 0))
	return s, nil
}

// Addr implements net.Listener.
func (l *listener) Addr() net.Addr { return vsock.Addr{CID: vsock.HostCID, Port: l.port} }

// Close implements net.Listener. Connections that nobody accepted are ended.
func (l *listener) Close() error {
	l.d.mu.Lock()
	if l.d.listeners[l.port] != l {
		l.d.mu.Unlock()
		return nil
	}
	delete(l.d.listeners, l.port)
	l.err = net.ErrClosed
	close(l.done)
	l.d.mu.Unlock()
	for {
		select {
		case s := <-l.backlog:
			s.end(net.ErrClosed, true)
		default:
			return nil
		}
	}
}
