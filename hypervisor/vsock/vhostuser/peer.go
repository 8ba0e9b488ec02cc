// SPDX-License-Identifier: Apache-2.0

package vhostuser

import (
	"fmt"
	"io"
	"syscall"

	"github.com/cloister-project/cloister/hypervisor/vsock"
)

// protocolError ends a stream whose packets make no sense.
func protocolError(format string, args ...any) error {
	return fmt.Errorf("the guest broke the vsock protocol: %s: %w", fmt.Sprintf(format, args...), syscall.EPROTO)
}

// receive handles a packet of the guest for this stream. It is called by the goroutine of the guest-to-host queue and
// blocks on nothing.
func (s *stream) receive(h *packetHeader, c *chain) {
	if h.op == opReset {
		s.peerReset()
		return
	}
	s.mu.Lock()
	s.updateCredit(h)
	var err error
	var done, credit bool
	switch h.op {
	case opResponse:
		if s.state != stateConnecting {
			err = protocolError("a second answer to a request")
			break
		}
		s.state = stateEstablished
		s.mu.Unlock()
		close(s.connected)
		return
	case opData:
		err = s.receiveData(h, c)
		credit = true
	case opShutdown:
		if s.state == stateConnecting {
			err = protocolError("shutdown of a stream that is not connected")
			break
		}
		done = s.receiveShutdown(h.flags)
	case opCreditUpdate:
	case opCreditRequest:
		s.mu.Unlock()
		s.d.check(s.d.rx.post(s, ctrlCredit, 0))
		return
	default:
		err = protocolError("operation %d on an open stream", h.op)
	}
	s.mu.Unlock()
	switch {
	case err != nil:
		s.d.log.WithError(err).WithField("port", s.ports.host).Debug("vsock: stream reset")
		s.end(err, true)
	case done:
		// Linux keeps a closed socket until this RST comes, or 8 seconds.
		s.end(syscall.EPIPE, true)
	case credit:
		s.grantCredit()
	}
}

// updateCredit takes the guest's credit out of a header. A counter that is behind is the rule on a guest with many CPUs
// (the header is filled in before the packets are put in order); one that is ahead of what was sent is a lie. Both
// leave things as they are, by which a liar only stops its own stream.
func (s *stream) updateCredit(h *packetHeader) {
	if h.fwdCnt-s.peerFwd <= s.txCnt-s.peerFwd {
		s.peerFwd, s.peerAlloc = h.fwdCnt, h.bufAlloc
	}
	if s.txCnt-s.peerFwd < s.peerAlloc {
		wake(s.wwake)
	}
}

func (s *stream) receiveData(h *packetHeader, c *chain) error {
	used := s.rxCnt - s.fwdCnt.Load()
	alloc := s.bufAlloc.Load()
	switch {
	case s.state == stateConnecting:
		return protocolError("data before the connection was accepted")
	case s.peerShut&shutSend != 0:
		return protocolError("data after the end of the data")
	case used > alloc || h.length > alloc-used:
		return protocolError("%d bytes more where the credit was %d", h.length, alloc-used)
	}
	n := int(h.length)
	s.rxCnt += h.length
	if s.closed || s.localShut&shutReceive != 0 {
		s.fwdCnt.Add(h.length) // it was under way when we stopped reading
		return nil
	}
	if s.rdst != nil && n > 0 {
		k := c.read(s.rdst[:min(n, len(s.rdst))])
		s.rdst, s.rn = nil, k
		s.fwdCnt.Add(uint32(k))
		n -= k
		wake(s.rwake)
	}
	s.buf.fill(c, n)
	return nil
}

// receiveShutdown reports whether the guest is done with both directions.
func (s *stream) receiveShutdown(flags uint32) bool {
	s.peerShut |= flags & shutBoth
	if s.peerShut&shutSend != 0 && s.rerr == nil {
		s.rerr = io.EOF
		wake(s.rwake)
	}
	if s.peerShut&shutReceive != 0 && s.werr == nil {
		s.werr = syscall.EPIPE
		wake(s.wwake)
	}
	return s.peerShut == shutBoth
}

func (s *stream) peerReset() {
	s.mu.Lock()
	connecting := s.state == stateConnecting
	s.mu.Unlock()
	if connecting {
		s.end(vsock.ErrRefused, false)
		return
	}
	s.end(syscall.ECONNRESET, false)
}
