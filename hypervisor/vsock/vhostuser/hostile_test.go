// SPDX-License-Identifier: Apache-2.0

package vhostuser

import (
	"bytes"
	"io"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cloister-project/cloister/hypervisor/vsock"
)

func TestBrokenRings(t *testing.T) {
	const q0, q1 = 0, 1
	for _, tc := range []struct {
		name  string
		queue int
		do    func(q *driverRing)
		want  string
	}{
		{"loop", q1, func(q *driverRing) {
			q.setDesc(0, testGPA, 4, descFlagNext, 1)
			q.setDesc(1, testGPA, 4, descFlagNext, 0)
			q.offer(0)
		}, "loop"},
		{"head", q1, func(q *driverRing) { q.offer(testRingSize) }, "descriptor 128"},
		{"next", q1, func(q *driverRing) {
			q.setDesc(0, testGPA, 44, descFlagNext, 60000)
			q.offer(0)
		}, "descriptor 60000"},
		{"index", q1, func(q *driverRing) { q.availIdx += testRingSize + 1 }, "chains available"},
		{"outside", q1, func(q *driverRing) {
			q.setDesc(0, testGPA+testMemory-40, 44, 0, 0)
			q.offer(0)
		}, "outside of the guest's memory"},
		{"far outside", q1, func(q *driverRing) {
			q.setDesc(0, 1<<64-20, 44, 0, 0)
			q.offer(0)
		}, "outside of the guest's memory"},
		{"indirect", q1, func(q *driverRing) {
			q.setDesc(0, testGPA, 64, descFlagIndirect, 0)
			q.offer(0)
		}, "indirect"},
		{"direction of a packet", q1, func(q *driverRing) {
			q.setDesc(0, testGPA, 64, descFlagWrite, 0)
			q.offer(0)
		}, "direction"},
		{"huge", q1, func(q *driverRing) {
			q.setDesc(0, testGPA, 8<<20, 0, 0)
			q.offer(0)
		}, "more than"},
		{"short packet", q1, func(q *driverRing) {
			q.setDesc(0, testGPA, 43, 0, 0)
			q.offer(0)
		}, "shorter than its header"},
		{"length", q1, func(q *driverRing) {
			h := packetHeader{srcCID: testCID, dstCID: 2, typ: typeStream, op: opData, length: 21}
			h.encode((*[packetHeaderLen]byte)(q.mem[txArea:]))
			q.setDesc(0, testGPA+txArea, 64, 0, 0)
			q.offer(0)
		}, "21 bytes in a buffer of 20"},
		{"direction of a buffer", q0, func(q *driverRing) {
			q.setDesc(127, testGPA, 64, 0, 0)
			q.offer(127)
		}, "direction"},
		{"tiny buffer", q0, func(q *driverRing) {
			q.setDesc(127, testGPA, 43, descFlagWrite, 0)
			q.offer(127)
		}, "receive buffer of 43"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r := newRig(t, Config{})
			r.fe.start([2]uint32{})
			go func() { _, _ = r.tryDial(7) }() // something to send
			q := r.fe.queues[tc.queue]
			tc.do(q)
			q.publish()
			q.notify()
			select {
			case <-r.d.Done():
			case <-time.After(testTimeout):
				t.Fatal("not found")
			}
			var re *RingError
			require.ErrorAs(t, r.d.Err(), &re)
			require.Equal(t, tc.queue, re.Queue)
			require.ErrorContains(t, re, tc.want)
			_, err := r.tryDial(1)
			require.ErrorAs(t, err, &re)
			r.fe.stop() // QEMU is still served
		})
	}
}

func TestStrayPackets(t *testing.T) {
	r := startRig(t, Config{})
	r.g.inject(packetHeader{op: opData, srcPort: 1, dstPort: 2, srcCID: 77}, nil)
	r.g.inject(packetHeader{op: opData, srcPort: 1, dstPort: 2, dstCID: 3}, nil)
	r.g.inject(packetHeader{op: opReset, srcPort: 1, dstPort: 2}, nil)
	r.g.inject(packetHeader{op: opData, srcPort: 5, dstPort: 6}, []byte("x"))
	r.g.inject(packetHeader{op: opRequest, srcPort: 7, dstPort: 8, typ: 2}, nil)
	want := []portPair{{host: 6, guest: 5}, {host: 8, guest: 7}}
	require.Eventually(t, func() bool {
		r.g.mu.Lock()
		defer r.g.mu.Unlock()
		return len(r.g.stray) == len(want)
	}, testTimeout, time.Millisecond)
	for i, h := range r.g.stray {
		require.EqualValues(t, opReset, h.op)
		require.Equal(t, want[i], portPair{host: h.srcPort, guest: h.dstPort})
	}
	require.NoError(t, r.d.Err())
}

func TestBrokenStreams(t *testing.T) {
	for _, tc := range []struct {
		name string
		do   func(c *guestConn)
		want string
	}{
		{"more than its credit", func(c *guestConn) {
			for range 5 {
				c.send(opData, 0, make([]byte, 60<<10))
			}
		}, "credit"},
		{"data after its end", func(c *guestConn) {
			c.send(opShutdown, shutSend, nil)
			c.send(opData, 0, []byte("x"))
		}, ""}, // what was read is whole: end of file
		{"request", func(c *guestConn) { c.send(opRequest, 0, nil) }, "operation 1"},
		{"response", func(c *guestConn) { c.send(opResponse, 0, nil) }, "second answer"},
		{"operation", func(c *guestConn) { c.send(77, 0, nil) }, "operation 77"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r := startRig(t, Config{})
			conns := make(chan *guestConn, 1)
			r.g.listen(1025, func(c *guestConn) { conns <- c })
			r.g.listen(1, echo)
			c, other := r.dial(1025), r.dial(1)
			gc := <-conns
			r.g.mu.Lock()
			tc.do(gc)
			r.g.mu.Unlock()
			require.Eventually(t, func() bool { return r.streams() == 1 }, testTimeout, time.Millisecond)
			_, err := io.Copy(io.Discard, c)
			if tc.want == "" {
				require.NoError(t, err)
			} else {
				require.ErrorIs(t, err, syscall.EPROTO)
				require.ErrorContains(t, err, tc.want)
			}
			require.Eventually(t, func() bool {
				r.g.mu.Lock()
				defer r.g.mu.Unlock()
				return gc.reset
			}, testTimeout, time.Millisecond)
			roundTrip(t, other, random(100<<10))
		})
	}
}

// A guest that says it has taken more than was sent, or less than before, only stops its own stream.
func TestCreditLies(t *testing.T) {
	r := startRig(t, Config{})
	conns := make(chan *guestConn, 1)
	r.g.listen(1025, func(c *guestConn) { conns <- c })
	r.g.listen(1, echo)
	c, other := r.dial(1025), r.dial(1)
	gc := <-conns
	for _, fwd := range []uint32{1 << 31, 1, 1<<32 - 1} {
		r.g.inject(packetHeader{op: opCreditUpdate, srcPort: gc.ports.guest, dstPort: gc.ports.host, fwdCnt: fwd, bufAlloc: 1<<32 - 1}, nil)
	}
	roundTrip(t, other, random(100<<10)) // they have arrived
	require.NoError(t, c.SetWriteDeadline(time.Now().Add(50*time.Millisecond)))
	n, err := c.Write(make([]byte, 1<<20))
	require.Error(t, err)
	require.Equal(t, guestBufAlloc, n)
}

// A guest that takes nothing in and asks for answers without end is answered with what fits.
func TestFloodWithoutReceiveBuffers(t *testing.T) {
	r := newRig(t, Config{})
	l, err := r.d.Listen(1024)
	require.NoError(t, err)
	r.fe.start([2]uint32{})
	r.g.run(0)
	for i := range uint32(20_000) {
		p := packetHeader{srcPort: 10_000 + i, dstPort: 1024, op: opRequest, bufAlloc: 1}
		r.g.inject(p, nil)
		p.op, p.flags = opShutdown, shutBoth
		r.g.inject(p, nil)
		p.op, p.dstPort = opData, 9
		r.g.inject(p, nil)
	}
	require.Eventually(t, func() bool {
		r.g.mu.Lock()
		defer r.g.mu.Unlock()
		return len(r.g.txq) == 0 && len(r.g.txBusy) == 0
	}, testTimeout, time.Millisecond)
	require.LessOrEqual(t, r.streams(), maxBacklog)
	r.d.rx.mu.Lock()
	require.Len(t, r.d.rx.resets, maxResets)
	require.LessOrEqual(t, len(r.d.rx.control), maxBacklog)
	require.NotZero(t, r.d.rx.dropped)
	r.d.rx.mu.Unlock()
	require.NoError(t, l.Close())
	require.NoError(t, r.d.Err())
}

// Buffers that come back late are used, and nobody is forgotten.
func TestReceiveBuffersComeBack(t *testing.T) {
	r := newRig(t, Config{})
	r.fe.start([2]uint32{})
	r.g.run(3)
	r.g.listen(1025, echo)
	conns := []vsock.Conn{r.dial(1025), r.dial(1025), r.dial(1025)}
	r.g.mu.Lock()
	r.g.holdRx = true
	r.g.mu.Unlock()
	done := make(chan error, len(conns))
	data := bytes.Repeat([]byte("0123456789"), 5000)
	for _, c := range conns {
		go func() { done <- tryRoundTrip(c, data) }()
	}
	require.Eventually(t, func() bool {
		r.g.mu.Lock()
		defer r.g.mu.Unlock()
		return len(r.g.held) == 3
	}, testTimeout, time.Millisecond)
	r.g.release()
	for range conns {
		require.NoError(t, <-done)
	}
}

func TestRegionsSideBySide(t *testing.T) {
	m := &memory{regions: []region{
		{guestAddr: 0x1000, userAddr: 0x9000, data: make([]byte, 0x1000)},
		{guestAddr: 0x2000, userAddr: 0xa000, data: make([]byte, 0x1000)},
	}}
	r := &ring{mem: m}
	var c chain
	require.NoError(t, r.addBuffer(&c, 0, 0x1ff0, 0x20))
	require.Len(t, c.segs, 2)
	require.Equal(t, 0x20, c.total)
	require.Error(t, r.addBuffer(&c, 0, 0x2ff0, 0x20))
	require.Nil(t, m.user(0x9fff, 2), "a ring does not reach over regions")
	require.Len(t, m.user(0xafff, 1), 1)
	require.Nil(t, m.user(0xb000, 1))
	require.Nil(t, m.guest(0xfff, 1))
}
