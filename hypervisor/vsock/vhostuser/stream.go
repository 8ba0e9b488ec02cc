// SPDX-License-Identifier: Apache-2.0

package vhostuser

import (
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/cloister-project/cloister/hypervisor/vsock"
)

type streamState int

const (
	stateConnecting streamState = iota
	stateEstablished
	stateClosing // SHUTDOWN of both directions is sent, RST is awaited
	stateDone    // no longer in the device's table
)

// stream is one vsock connection; see the package comment for its states.
type stream struct {
	d     *Device
	ports portPair

	rmu, wmu sync.Mutex // serialise Read and Write
	rdl, wdl deadline
	rwake    chan struct{} // a token for the Read that waits
	wwake    chan struct{} // a token for the Write that waits

	connected chan struct{} // closed when connecting has ended, with whichever result
	refusal   error         // set before connected is closed: why there is no connection

	bufAlloc atomic.Uint32 // credit that the guest was given
	fwdCnt   atomic.Uint32 // bytes of the guest's that were taken out of the buffer
	fwdSent  atomic.Uint32 // fwdCnt as the guest knows it

	mu        sync.Mutex
	state     streamState
	closed    bool   // by Close
	localShut uint32 // shut* flags that we sent
	peerShut  uint32
	rerr      error // what Read gives once the buffer is empty
	werr      error
	buf       recvBuf
	rdst      []byte // of a Read that waits: data is put there at once
	rn        int    // how much was
	rxCnt     uint32 // bytes that the guest has sent
	txCnt     uint32 // bytes that we have sent, or are about to
	peerAlloc uint32 // the guest's credit
	peerFwd   uint32
	closing   *time.Timer

	// Guarded by Device.rx.mu.
	ctrl       uint32
	ctrlQueued bool
	shutFlags  uint32 // sent or about to be: no data follows shutSend
	waiting    bool   // in rx.waiters
	detached   bool
}

var _ vsock.Conn = (*stream)(nil)

func newStream(d *Device, ports portPair, state streamState, bufAlloc uint32) *stream {
	s := &stream{
		d: d, ports: ports, state: state,
		rwake: make(chan struct{}, 1), wwake: make(chan struct{}, 1), connected: make(chan struct{}),
		buf: recvBuf{pool: &d.chunks},
	}
	s.bufAlloc.Store(bufAlloc)
	return s
}

func wake(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default: // a token is there already
	}
}

func (s *stream) wakeWriter() { wake(s.wwake) }

func (s *stream) localAddr() vsock.Addr  { return vsock.Addr{CID: vsock.HostCID, Port: s.ports.host} }
func (s *stream) remoteAddr() vsock.Addr { return vsock.Addr{CID: s.d.guestCID, Port: s.ports.guest} }

// LocalAddr implements net.Conn.
func (s *stream) LocalAddr() net.Addr { return s.localAddr() }

// RemoteAddr implements net.Conn.
func (s *stream) RemoteAddr() net.Addr { return s.remoteAddr() }

func (s *stream) opError(op string, err error) error {
	return &net.OpError{Op: op, Net: "vsock", Source: s.localAddr(), Addr: s.remoteAddr(), Err: err}
}

// Read implements net.Conn. It returns everything that came before the guest's half-close, close or reset, then io.EOF
// or the error.
func (s *stream) Read(p []byte) (int, error) {
	s.rmu.Lock()
	defer s.rmu.Unlock()
	for {
		if s.rdl.expired() {
			return 0, s.opError("read", os.ErrDeadlineExceeded)
		}
		s.mu.Lock()
		switch {
		case s.closed:
			s.mu.Unlock()
			return 0, s.opError("read", net.ErrClosed)
		case s.buf.length > 0:
			n := s.buf.read(p)
			s.fwdCnt.Add(uint32(n))
			s.mu.Unlock()
			s.grantCredit()
			return n, nil
		case s.rerr != nil:
			err := s.rerr
			s.mu.Unlock()
			if err == io.EOF {
				return 0, io.EOF
			}
			return 0, s.opError("read", err)
		case len(p) == 0:
			s.mu.Unlock()
			return 0, nil
		}
		s.rdst, s.rn = p, 0
		s.mu.Unlock()
		select {
		case <-s.rwake:
		case <-s.rdl.wait():
		}
		s.mu.Lock()
		n := s.rn
		s.rdst, s.rn = nil, 0
		s.mu.Unlock()
		if n > 0 {
			return n, nil
		}
	}
}

// grantCredit tells the guest what was read once that is a good part of its credit. Packets that go the same way tell
// it too, at no cost.
func (s *stream) grantCredit() {
	if s.fwdCnt.Load()-s.fwdSent.Load() >= s.bufAlloc.Load()/4 {
		s.d.check(s.d.rx.post(s, ctrlCredit, 0))
	}
}

// Write implements net.Conn. It returns when everything is in buffers of the guest.
func (s *stream) Write(p []byte) (n int, err error) {
	s.wmu.Lock()
	defer s.wmu.Unlock()
	for {
		grant, err := s.takeCredit(len(p) - n)
		if err != nil {
			s.d.rx.leave(s)
			return n, s.opError("write", err)
		}
		if n == len(p) {
			return n, nil
		}
		wait := grant == 0
		if wait {
			// Whoever waits for credit does not stand in the way of those that have it.
			s.d.rx.leave(s)
		} else {
			var k int
			k, wait, err = s.d.rx.send(s, p[n:n+grant])
			s.returnCredit(grant - k)
			n += k
			s.d.check(err)
			if n == len(p) {
				return n, nil
			}
		}
		if wait {
			select {
			case <-s.wwake:
			case <-s.wdl.wait():
			}
		}
	}
}

// takeCredit reserves up to want bytes of the guest's credit, or returns the reason why nothing may be written.
func (s *stream) takeCredit(want int) (int, error) {
	if s.wdl.expired() {
		return 0, os.ErrDeadlineExceeded
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.closed:
		return 0, net.ErrClosed
	case s.werr != nil:
		return 0, s.werr
	}
	inFlight := s.txCnt - s.peerFwd
	if inFlight >= s.peerAlloc {
		return 0, nil
	}
	grant := min(int64(want), int64(s.peerAlloc-inFlight))
	s.txCnt += uint32(grant)
	return int(grant), nil
}

func (s *stream) returnCredit(n int) {
	if n > 0 {
		s.mu.Lock()
		s.txCnt -= uint32(n)
		s.mu.Unlock()
	}
}

// CloseWrite implements vsock.Conn. Data written before it reaches the guest before it.
func (s *stream) CloseWrite() error { return s.shutdown(shutSend) }

// CloseRead implements vsock.Conn.
func (s *stream) CloseRead() error { return s.shutdown(shutReceive) }

func (s *stream) shutdown(flag uint32) error {
	s.mu.Lock()
	switch {
	case s.closed:
		s.mu.Unlock()
		return s.opError("close", net.ErrClosed)
	case s.localShut&flag != 0:
		s.mu.Unlock()
		return nil
	}
	s.localShut |= flag
	if flag == shutSend {
		if s.werr == nil {
			s.werr = syscall.EPIPE
		}
		wake(s.wwake)
	} else {
		s.fwdCnt.Add(uint32(s.buf.length))
		s.buf.drop()
		s.rerr = io.EOF
		wake(s.rwake)
	}
	post := s.state == stateEstablished
	s.mu.Unlock()
	if post {
		s.d.check(s.d.rx.post(s, ctrlShutdown, flag))
	}
	return nil
}

// Close implements net.Conn. It does not wait for the guest; what was written still reaches it.
func (s *stream) Close() error {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return nil
	}
	s.closed = true
	s.localShut = shutBoth
	s.fwdCnt.Add(uint32(s.buf.length))
	s.buf.drop()
	wake(s.rwake)
	wake(s.wwake)
	post := s.state == stateEstablished
	if post {
		s.state = stateClosing
		s.closing = time.AfterFunc(s.d.closeTimeout, func() { s.end(net.ErrClosed, true) })
	}
	s.mu.Unlock()
	s.rdl.set(time.Time{})
	s.wdl.set(time.Time{})
	if post {
		s.d.check(s.d.rx.post(s, ctrlShutdown, shutBoth))
	}
	return nil
}

// end takes the stream out of the device, with a RST if reset is set. What was received can still be read; then err,
// unless an end was set before.
func (s *stream) end(err error, reset bool) {
	s.mu.Lock()
	if s.state == stateDone {
		s.mu.Unlock()
		return
	}
	connecting := s.state == stateConnecting
	s.state = stateDone
	if s.closing != nil {
		s.closing.Stop()
		s.closing = nil
	}
	if s.rerr == nil {
		s.rerr = err
	}
	if s.werr == nil {
		s.werr = err
	}
	wake(s.rwake)
	wake(s.wwake)
	s.mu.Unlock()
	s.d.remove(s)
	s.d.check(s.d.rx.detach(s, reset))
	if connecting {
		s.refusal = err
		close(s.connected)
	}
}

// SetDeadline implements net.Conn.
func (s *stream) SetDeadline(t time.Time) error {
	if err := s.SetReadDeadline(t); err != nil {
		return err
	}
	return s.SetWriteDeadline(t)
}

// SetReadDeadline implements net.Conn.
func (s *stream) SetReadDeadline(t time.Time) error { return s.setDeadline(&s.rdl, t) }

// SetWriteDeadline implements net.Conn.
func (s *stream) SetWriteDeadline(t time.Time) error { return s.setDeadline(&s.wdl, t) }

func (s *stream) setDeadline(d *deadline, t time.Time) error {
	s.mu.Lock()
	closed := s.closed
	s.mu.Unlock()
	if closed {
		return s.opError("set", net.ErrClosed)
	}
	d.set(t)
	return nil
}
