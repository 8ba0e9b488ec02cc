// SPDX-License-Identifier: Apache-2.0

package vhostuser

import (
	"errors"
	"io"
	"sync"
	"testing"
)

const (
	guestBufAlloc = 64 << 10
	rxBufSize     = 4096 // of the payload
	txBufSize     = 64 << 10
	rxArea        = 0x10000
	txArea        = 2 << 20
)

var errGuestReset = errors.New("reset by the host")

// fakeGuest is a small vsock stack over the driver's side of the rings. It does what Linux's virtio_transport does.
type fakeGuest struct {
	fe     *frontEnd
	rx, tx *driverRing
	wg     sync.WaitGroup

	mu        sync.Mutex
	cond      *sync.Cond
	conns     map[portPair]*guestConn
	listeners map[uint32]func(*guestConn)
	txq       []guestPacket
	txFree    []int // offsets of send buffers
	txBusy    map[uint16]int
	rxBufs    map[uint16][]buffer
	holdRx    bool // no receive buffers are given back
	held      [][]buffer
	split     bool // receive buffers of three descriptors
	stray     []packetHeader
	ended     bool
	nextPort  uint32
}

type guestPacket struct {
	h    packetHeader
	data []byte
}

type guestConn struct {
	g                  *fakeGuest
	ports              portPair
	connecting, refuse bool
	buf                []byte
	peerShut, shut     uint32
	reset, removed     bool
	rxCnt, fwdCnt      uint32
	fwdSent            uint32
	txCnt              uint32
	peerAlloc, peerFwd uint32
	alloc              uint32
}

func newFakeGuest(t testing.TB, fe *frontEnd) *fakeGuest {
	g := &fakeGuest{
		fe: fe, rx: fe.queues[0], tx: fe.queues[1], conns: map[portPair]*guestConn{}, listeners: map[uint32]func(*guestConn){},
		txBusy: map[uint16]int{}, rxBufs: map[uint16][]buffer{}, nextPort: 5000,
	}
	g.cond = sync.NewCond(&g.mu)
	for i := range testRingSize / 2 {
		g.txFree = append(g.txFree, txArea+i*(txBufSize+packetHeaderLen))
	}
	t.Cleanup(g.end)
	return g
}

// run starts the driver: n receive buffers, and the handlers of both interrupts.
func (g *fakeGuest) run(n int) {
	g.mu.Lock()
	for i := range n {
		off := rxArea + i*(rxBufSize+packetHeaderLen)
		b := []buffer{{off, rxBufSize + packetHeaderLen}}
		if g.split {
			b = []buffer{{off, 10}, {off + 10, 100}, {off + 110, rxBufSize + packetHeaderLen - 110}}
		}
		g.addRx(b)
	}
	g.rx.publish()
	g.mu.Unlock()
	g.wg.Add(2)
	go func() {
		defer g.wg.Done()
		for g.receive(); g.rx.wait(); g.receive() {
		}
	}()
	go func() {
		defer g.wg.Done()
		for g.reclaim(); g.tx.wait(); g.reclaim() {
		}
	}()
}

func (g *fakeGuest) end() {
	g.mu.Lock()
	g.ended = true
	g.cond.Broadcast()
	g.mu.Unlock()
	_ = g.rx.call.Close()
	_ = g.tx.call.Close()
	g.wg.Wait()
}

func (g *fakeGuest) addRx(b []buffer) {
	head, ok := g.rx.add(b, descFlagWrite)
	if !ok {
		panic("receive ring is full")
	}
	g.rxBufs[head] = b
}

func (g *fakeGuest) receive() {
	g.mu.Lock()
	defer g.mu.Unlock()
	for {
		head, length, ok := g.rx.take()
		if !ok {
			break
		}
		bufs := g.rxBufs[head]
		var raw []byte
		for _, b := range bufs {
			raw = append(raw, g.fe.mem[b.off:b.off+b.length]...)
		}
		raw = raw[:length]
		h := decodePacketHeader((*[packetHeaderLen]byte)(raw[:packetHeaderLen]))
		if int(h.length) != len(raw)-packetHeaderLen {
			panic("used length and header differ")
		}
		if g.holdRx {
			g.held = append(g.held, bufs)
		} else {
			g.addRx(bufs)
		}
		g.packet(&h, raw[packetHeaderLen:])
	}
	g.rx.publish()
	g.cond.Broadcast()
}

func (g *fakeGuest) release() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.holdRx = false
	for _, b := range g.held {
		g.addRx(b)
	}
	g.held = nil
	g.rx.publish()
}

func (g *fakeGuest) reclaim() {
	g.mu.Lock()
	defer g.mu.Unlock()
	for {
		head, _, ok := g.tx.take()
		if !ok {
			break
		}
		g.txFree = append(g.txFree, g.txBusy[head])
		delete(g.txBusy, head)
	}
	g.pump()
	g.cond.Broadcast()
}

// pump puts packets into the ring. g.mu is held.
func (g *fakeGuest) pump() {
	sent := false
	for len(g.txq) > 0 && len(g.txFree) > 0 && len(g.tx.free) >= 2 {
		p := g.txq[0]
		g.txq = g.txq[1:]
		off := g.txFree[len(g.txFree)-1]
		g.txFree = g.txFree[:len(g.txFree)-1]
		p.h.encode((*[packetHeaderLen]byte)(g.fe.mem[off:]))
		copy(g.fe.mem[off+packetHeaderLen:], p.data)
		bufs := []buffer{{off, packetHeaderLen}}
		if len(p.data) > 0 {
			bufs = append(bufs, buffer{off + packetHeaderLen, len(p.data)})
		}
		head, _ := g.tx.add(bufs, 0)
		g.txBusy[head] = off
		sent = true
	}
	if sent {
		g.tx.publish()
	}
}

func (g *fakeGuest) sendHeader(p portPair, op uint16, flags uint32) {
	g.raw(packetHeader{op: op, flags: flags, srcPort: p.guest, dstPort: p.host}, nil)
}

// raw sends a packet; g.mu is held. The addresses are filled in unless they are set.
func (g *fakeGuest) raw(h packetHeader, data []byte) {
	if h.srcCID == 0 {
		h.srcCID = testCID
	}
	if h.dstCID == 0 {
		h.dstCID = 2
	}
	if h.typ == 0 {
		h.typ = typeStream
	}
	if h.length == 0 {
		h.length = uint32(len(data))
	}
	g.txq = append(g.txq, guestPacket{h, data})
	g.pump()
}

func (g *fakeGuest) inject(h packetHeader, data []byte) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.raw(h, data)
}

func (g *fakeGuest) listen(port uint32, f func(*guestConn)) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.listeners[port] = f
}

func (g *fakeGuest) newConn(p portPair) *guestConn {
	c := &guestConn{g: g, ports: p, alloc: guestBufAlloc}
	g.conns[p] = c
	return c
}

func (c *guestConn) send(op uint16, flags uint32, data []byte) {
	c.fwdSent = c.fwdCnt
	c.g.raw(packetHeader{op: op, flags: flags, srcPort: c.ports.guest, dstPort: c.ports.host, bufAlloc: c.alloc, fwdCnt: c.fwdCnt}, data)
}

func (g *fakeGuest) packet(h *packetHeader, data []byte) {
	p := portPair{host: h.srcPort, guest: h.dstPort}
	c := g.conns[p]
	if c == nil {
		l := g.listeners[h.dstPort]
		switch {
		case h.op == opRequest && l != nil:
			c = g.newConn(p)
			c.peerAlloc = h.bufAlloc
			c.send(opResponse, 0, nil)
			g.wg.Add(1)
			go func() {
				defer g.wg.Done()
				l(c)
			}()
		case h.op != opReset:
			g.sendHeader(p, opReset, 0)
		}
		g.stray = append(g.stray, *h)
		return
	}
	c.peerAlloc, c.peerFwd = h.bufAlloc, h.fwdCnt
	if c.connecting && h.op != opResponse && h.op != opReset {
		// As Linux does.
		c.connecting, c.refuse, c.reset = false, true, true
		c.remove()
		g.sendHeader(p, opReset, 0)
		return
	}
	switch h.op {
	case opResponse:
		c.connecting = false
	case opData:
		if c.rxCnt+h.length-c.fwdCnt > c.alloc {
			panic("host sent more than its credit")
		}
		if c.peerShut&shutSend != 0 {
			panic("data after shutdown")
		}
		c.rxCnt += h.length
		c.buf = append(c.buf, data...)
	case opShutdown:
		c.peerShut |= h.flags
		if c.peerShut == shutBoth {
			c.remove()
			if len(c.buf) == 0 {
				g.sendHeader(p, opReset, 0)
			}
		}
	case opReset:
		c.refuse = c.connecting
		c.connecting, c.reset = false, true
		c.remove()
	case opCreditRequest:
		c.send(opCreditUpdate, 0, nil)
	}
}

func (c *guestConn) remove() {
	c.removed = true
	delete(c.g.conns, c.ports)
}

func (g *fakeGuest) dial(port uint32) (*guestConn, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.nextPort++
	c := g.newConn(portPair{host: port, guest: g.nextPort})
	c.connecting = true
	c.send(opRequest, 0, nil)
	for c.connecting && !g.ended {
		g.cond.Wait()
	}
	if c.refuse || g.ended {
		return nil, errGuestReset
	}
	return c, nil
}

func (c *guestConn) Read(p []byte) (int, error) {
	c.g.mu.Lock()
	defer c.g.mu.Unlock()
	for len(c.buf) == 0 {
		switch {
		case c.peerShut&shutSend != 0:
			return 0, io.EOF
		case c.reset || c.g.ended:
			return 0, errGuestReset
		}
		c.g.cond.Wait()
	}
	n := copy(p, c.buf)
	c.buf = c.buf[n:]
	c.fwdCnt += uint32(n)
	if c.fwdCnt-c.fwdSent >= c.alloc/2 || len(c.buf) == 0 {
		if !c.removed {
			c.send(opCreditUpdate, 0, nil)
		}
	}
	return n, nil
}

func (c *guestConn) Write(p []byte) (n int, err error) {
	c.g.mu.Lock()
	defer c.g.mu.Unlock()
	for n < len(p) {
		if c.reset || c.removed || c.g.ended || c.peerShut&shutReceive != 0 {
			return n, errGuestReset
		}
		credit := int(c.peerAlloc - (c.txCnt - c.peerFwd))
		if credit <= 0 || len(c.g.txq) > 8 {
			c.g.cond.Wait()
			continue
		}
		k := min(len(p)-n, credit, txBufSize)
		c.txCnt += uint32(k)
		c.send(opData, 0, append([]byte(nil), p[n:n+k]...))
		n += k
	}
	return n, nil
}

func (c *guestConn) shutdown(flags uint32) {
	c.g.mu.Lock()
	defer c.g.mu.Unlock()
	c.shut |= flags
	c.send(opShutdown, flags, nil)
}

func (c *guestConn) CloseWrite() { c.shutdown(shutSend) }

// Close waits for the host's answer, like a socket that lingers. It is false if there was none.
func (c *guestConn) Close() bool {
	c.g.mu.Lock()
	defer c.g.mu.Unlock()
	if c.reset {
		return true
	}
	if c.peerShut == shutBoth {
		c.g.sendHeader(c.ports, opReset, 0)
		return true
	}
	c.send(opShutdown, shutBoth, nil)
	for !c.removed && !c.g.ended {
		c.g.cond.Wait()
	}
	return c.removed
}
