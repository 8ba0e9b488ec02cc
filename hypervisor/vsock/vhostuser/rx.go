// SPDX-License-Identifier: Apache-2.0

package vhostuser

import (
	"encoding/binary"
	"slices"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/cloister-project/cloister/hypervisor/vsock"
)

const (
	// rxTurn is how many packets a stream may send before the next one that waits has its turn.
	rxTurn = 64
	// maxResets bounds the answers to packets without a stream. Only a guest that sends many of them and takes no
	// packets in loses one, and with it the answer to nothing but its own nonsense.
	maxResets = 256
)

// Control packets that a stream waits to send, in the order in which they are sent.
const (
	ctrlRequest = 1 << iota
	ctrlResponse
	ctrlCredit
	ctrlShutdown
)

// queue is what both queues have in common.
type queue struct {
	mu      sync.Mutex
	ring    *ring // nil: stopped
	call    int   // eventfd by which the guest is interrupted, -1: none
	quiet   bool  // the last signal made no interrupt, since the guest had turned them off
	recheck func()
}

// signal shows the guest what was done and interrupts it if it wants that. The caller holds mu.
func (q *queue) signal() {
	if q.ring == nil || q.ring.unsignaled == 0 {
		return
	}
	q.ring.unsignaled = 0
	q.ring.publish()
	q.interrupt()
	if q.quiet {
		q.recheck()
	}
}

// interrupt interrupts the guest unless it has turned that off. The caller holds mu.
func (q *queue) interrupt() {
	q.quiet = !q.ring.wantsCall()
	if q.call < 0 || q.quiet {
		return
	}
	var one [8]byte
	binary.NativeEndian.PutUint64(one[:], 1)
	// Non-blocking. It fails only if the counter is full, and then the guest is being interrupted anyway.
	_, _ = unix.Write(q.call, one[:])
}

// setCall takes fd over.
func (q *queue) setCall(fd int) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.call >= 0 {
		_ = unix.Close(q.call)
	}
	q.call = fd
	if fd >= 0 && q.ring != nil {
		// QEMU sets the one that reaches the guest after it has started the queue: what was signalled in between is lost.
		q.interrupt()
	}
}

// portPair names a stream; the context ids are always the same.
type portPair struct{ host, guest uint32 }

// rxQueue is the queue from host to guest. Whoever has something to send puts it there himself; what finds no buffer
// waits: control packets as bits in their stream, writers in a queue in which each has its turn.
type rxQueue struct {
	queue
	guestCID uint64
	control  []*stream // with pending control packets
	resets   []portPair
	dropped  int       // resets for which there was no room
	waiters  []*stream // writers; the first has its turn
}

func (q *rxQueue) started() bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.ring != nil
}

// emit sends one packet with as much of data as fits. ok is false when the guest offers no buffer.
func (q *rxQueue) emit(h *packetHeader, data []byte) (n int, ok bool, err error) {
	if q.ring == nil {
		return 0, false, nil
	}
	head, c, ok, err := q.ring.next(true)
	if err != nil || !ok {
		return 0, false, err
	}
	room := c.total - packetHeaderLen
	if room < 0 || (room == 0 && len(data) > 0) {
		return 0, false, q.ring.broken("a receive buffer of %d bytes", c.total)
	}
	n = min(len(data), room, maxPacketData)
	h.srcCID, h.dstCID, h.typ, h.length = vsock.HostCID, q.guestCID, typeStream, uint32(n)
	var b [packetHeaderLen]byte
	h.encode(&b)
	c.write(b[:])
	c.write(data[:n])
	q.ring.push(head, packetHeaderLen+n)
	return n, true, nil
}

// header starts a packet of a stream. Every packet carries the stream's credit.
func (q *rxQueue) header(s *stream, op uint16) packetHeader {
	fwd := s.fwdCnt.Load()
	s.fwdSent.Store(fwd)
	return packetHeader{
		srcPort: s.ports.host, dstPort: s.ports.guest, op: op, bufAlloc: s.bufAlloc.Load(), fwdCnt: fwd,
	}
}

// flush sends what waits except data, until there are no buffers.
func (q *rxQueue) flush() error {
	for len(q.resets) > 0 {
		h := packetHeader{srcPort: q.resets[0].host, dstPort: q.resets[0].guest, op: opReset}
		if _, ok, err := q.emit(&h, nil); err != nil || !ok {
			return err
		}
		q.resets = q.resets[1:]
	}
	q.resets = nil
	for len(q.control) > 0 {
		s := q.control[0]
		for s.ctrl != 0 {
			h := q.header(s, 0)
			bit := s.ctrl & -s.ctrl
			switch bit {
			case ctrlRequest:
				h.op = opRequest
			case ctrlResponse:
				h.op = opResponse
			case ctrlCredit:
				h.op = opCreditUpdate
			case ctrlShutdown:
				h.op, h.flags = opShutdown, s.shutFlags
			}
			if _, ok, err := q.emit(&h, nil); err != nil || !ok {
				return err
			}
			s.ctrl &^= bit
		}
		s.ctrlQueued = false
		q.control = q.control[1:]
	}
	q.control = nil
	return nil
}

// run flushes, and arms the notification if something waits for buffers. It is false when there are none.
func (q *rxQueue) run() (buffers bool, err error) {
	for q.ring != nil {
		if err := q.flush(); err != nil {
			return false, q.fault(err)
		}
		n, err := q.ring.available()
		if err != nil {
			return false, q.fault(err)
		}
		pending := len(q.resets) > 0 || len(q.control) > 0
		switch {
		case n > 0 && pending:
			continue // they came after flush had looked
		case n > 0:
			return true, nil
		case !pending && len(q.waiters) == 0:
			return false, nil
		}
		// Ask for a kick first, then look again: a buffer that came in between brings no kick.
		if q.ring.setKicks(true) {
			q.recheck()
		}
		if n, err = q.ring.available(); err != nil {
			return false, q.fault(err)
		}
		if n == 0 {
			return false, nil
		}
		q.ring.setKicks(false)
	}
	return false, nil
}

// fault stops a queue that the guest has broken.
func (q *rxQueue) fault(err error) error {
	q.ring = nil
	return err
}

// service is called for each kick and when the queue starts.
func (q *rxQueue) service() error {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.ring == nil {
		return nil
	}
	q.ring.setKicks(false)
	return q.runAndWake()
}

// runAndWake runs, tells the guest, and lets a writer go on if there are buffers left.
func (q *rxQueue) runAndWake() error {
	buffers, err := q.run()
	q.signal()
	if buffers {
		q.wakeFirst()
	}
	return err
}

func (q *rxQueue) wakeFirst() {
	if len(q.waiters) > 0 {
		q.waiters[0].wakeWriter()
	}
}

// post adds control packets to those that a stream has pending, queues it, and sends what can be sent. A stream that is
// detached posts nothing.
func (q *rxQueue) post(s *stream, ctrl, shutFlags uint32) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	if s.detached {
		return nil
	}
	s.ctrl |= ctrl
	s.shutFlags |= shutFlags
	if !s.ctrlQueued {
		s.ctrlQueued = true
		q.control = append(q.control, s)
	}
	return q.runAndWake()
}

// reset answers a packet that belongs to no stream.
func (q *rxQueue) reset(p portPair) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.resetLocked(p)
}

func (q *rxQueue) resetLocked(p portPair) error {
	if len(q.resets) >= maxResets {
		q.dropped++
		return nil
	}
	q.resets = append(q.resets, p)
	return q.runAndWake()
}

// detach ends all sending of a stream, and sends a RST if reset is set. A REQUEST that was never sent needs none.
func (q *rxQueue) detach(s *stream, reset bool) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	if s.detached {
		return nil
	}
	s.detached = true
	if s.ctrl&ctrlRequest != 0 {
		reset = false
	}
	if s.ctrlQueued {
		q.control = slices.DeleteFunc(q.control, func(o *stream) bool { return o == s })
		s.ctrlQueued, s.ctrl = false, 0
	}
	q.leaveLocked(s)
	if !reset {
		return nil
	}
	return q.resetLocked(s.ports)
}

// leave takes a writer out of the queue of those that wait.
func (q *rxQueue) leave(s *stream) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.leaveLocked(s)
}

func (q *rxQueue) leaveLocked(s *stream) {
	if !s.waiting {
		return
	}
	s.waiting = false
	first := q.waiters[0] == s
	q.waiters = slices.DeleteFunc(q.waiters, func(o *stream) bool { return o == s })
	if first {
		// The turn may have been given already; pass it on.
		q.wakeFirst()
	}
}

// send sends data of a stream: n bytes. If wait is set the caller waits to be woken before it goes on.
func (q *rxQueue) send(s *stream, data []byte) (n int, wait bool, err error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if s.detached || s.shutFlags&shutSend != 0 {
		return 0, false, nil // the state of the stream says why
	}
	if len(q.waiters) > 0 && q.waiters[0] != s {
		if !s.waiting {
			s.waiting = true
			q.waiters = append(q.waiters, s)
		}
		return 0, true, nil
	}
	for packets := 0; n < len(data) && packets < rxTurn; {
		// Control packets go first: the answer to the guest's REQUEST may be among them.
		if len(q.resets) == 0 && len(q.control) == 0 {
			h := q.header(s, opData)
			k, ok, err := q.emit(&h, data[n:])
			if err != nil {
				return n, false, q.fault(err)
			}
			if ok {
				n += k
				packets++
				continue
			}
		}
		if !s.waiting {
			s.waiting = true
			q.waiters = append(q.waiters, s)
		}
		q.signal()
		buffers, err := q.run()
		if err != nil {
			return n, false, err
		}
		if !buffers {
			return n, true, nil
		}
	}
	q.signal()
	if s.waiting {
		s.waiting = false
		q.waiters = q.waiters[1:]
	}
	if len(q.waiters) > 0 {
		if n < len(data) {
			s.waiting = true
			q.waiters = append(q.waiters, s)
			wait = true
		}
		q.wakeFirst()
	}
	return n, wait, nil
}
