// SPDX-License-Identifier: Apache-2.0

package vhostuser

import (
	"encoding/binary"
	"io"
	"net"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

func TestConfig(t *testing.T) {
	for _, cfg := range []Config{{}, {GuestCID: 2}, {GuestCID: 1<<32 - 1}, {GuestCID: 3, BufferSize: -1}, {GuestCID: 3, BufferSize: 1 << 30}} {
		_, err := New(cfg)
		require.ErrorIs(t, err, errdefs.ErrInvalidArgument, "%+v", cfg)
	}
}

func TestFrontEndDisconnect(t *testing.T) {
	r := startRig(t, Config{})
	l, err := r.d.Listen(1024)
	require.NoError(t, err)
	r.g.listen(1025, func(c *guestConn) { _, _ = c.Write([]byte("last words")) })
	c := r.dial(1025)
	require.Eventually(t, func() bool {
		r.d.tx.mu.Lock()
		defer r.d.tx.mu.Unlock()
		return r.d.tx.ring.usedIdx >= 2 // the answer and the words
	}, testTimeout, time.Millisecond)
	r.fe.disconnect()
	<-r.d.Done()
	require.ErrorIs(t, r.d.Err(), syscall.ECONNRESET)
	b, err := io.ReadAll(c)
	require.Equal(t, "last words", string(b))
	require.ErrorIs(t, err, syscall.ECONNRESET)
	require.ErrorContains(t, err, "QEMU")
	_, err = c.Write(b)
	require.ErrorIs(t, err, syscall.ECONNRESET)
	_, err = l.Accept()
	require.ErrorIs(t, err, syscall.ECONNRESET)
	_, err = r.tryDial(1025)
	require.ErrorIs(t, err, syscall.ECONNRESET)
	_, err = r.d.Listen(9)
	require.Error(t, err)
}

// What the guest has put into its queue when the VM ends is read, although nobody kicks any more.
func TestLastWordsInTheQueue(t *testing.T) {
	r := startRig(t, Config{})
	conns := make(chan *guestConn, 1)
	r.g.listen(1025, func(c *guestConn) { conns <- c })
	c := r.dial(1025)
	gc := <-conns
	q := r.fe.queues[1]
	r.g.mu.Lock()
	off := r.g.txFree[0]
	h := packetHeader{srcCID: testCID, dstCID: 2, srcPort: gc.ports.guest, dstPort: gc.ports.host, length: 4, typ: typeStream, op: opData}
	h.encode((*[packetHeaderLen]byte)(r.fe.mem[off:]))
	copy(r.fe.mem[off+packetHeaderLen:], "last")
	q.add([]buffer{{off, packetHeaderLen + 4}}, 0)
	// The index without the kick.
	storeAvail(q)
	r.g.mu.Unlock()
	r.fe.disconnect()
	b, err := io.ReadAll(c)
	require.ErrorIs(t, err, syscall.ECONNRESET)
	require.Equal(t, "last", string(b))
}

// A notification that was lost is made good by recheck, which runs by itself after traffic.
func TestLostNotifications(t *testing.T) {
	r := newRig(t, Config{})
	r.fe.start([2]uint32{})
	rx, tx := r.fe.queues[0], r.fe.queues[1]
	settled := func() bool {
		r.d.tx.mu.Lock()
		defer r.d.tx.mu.Unlock()
		return r.d.tx.ring.flags == 0 && !r.d.rechecking.Load()
	}
	require.Eventually(t, settled, testTimeout, time.Millisecond)

	// A packet without a kick; a receive buffer, which is used for the answer, without an interrupt.
	rx.add([]buffer{{rxArea, 100}}, descFlagWrite)
	storeAvail(rx)
	rx.mem[rx.avail] = availNoInterrupt
	h := packetHeader{srcCID: testCID, dstCID: 2, srcPort: 5, dstPort: 6, typ: typeStream, op: opData}
	h.encode((*[packetHeaderLen]byte)(tx.mem[txArea:]))
	tx.add([]buffer{{txArea, packetHeaderLen}}, 0)
	storeAvail(tx)
	r.d.recheck()
	_, used := loadPair(tx.mem[tx.used:])
	require.EqualValues(t, 1, used)
	_, used = loadPair(rx.mem[rx.used:])
	require.EqualValues(t, 1, used)
	r.d.rx.mu.Lock()
	quiet := r.d.rx.quiet
	r.d.rx.mu.Unlock()
	require.True(t, quiet)

	_, _ = unix.Read(rx.callFD, make([]byte, 8)) // an earlier one
	rx.mem[rx.avail] = 0
	r.d.recheck()
	var count [8]byte
	_, err := unix.Read(rx.callFD, count[:])
	require.NoError(t, err, "the interrupt came")

	// A request that waits for a buffer, and the buffer without a kick.
	go func() { _, _ = r.tryDial(7) }()
	require.Eventually(t, func() bool {
		r.d.rx.mu.Lock()
		defer r.d.rx.mu.Unlock()
		return len(r.d.rx.control) == 1
	}, testTimeout, time.Millisecond)
	rx.add([]buffer{{rxArea, 100}}, descFlagWrite)
	storeAvail(rx)
	r.d.recheck()
	_, used = loadPair(rx.mem[rx.used:])
	require.EqualValues(t, 2, used)
}

func storeAvail(q *driverRing) {
	binary.LittleEndian.PutUint16(q.mem[q.avail+2:], q.availIdx)
}

func TestCloseEndsEverything(t *testing.T) {
	r := newRig(t, Config{})
	l, err := r.d.Listen(1024)
	require.NoError(t, err)
	errs := make(chan error, 2)
	go func() {
		_, err := r.tryDial(1)
		errs <- err
	}()
	go func() {
		_, err := l.Accept()
		errs <- err
	}()
	require.Eventually(t, func() bool { return r.streams() == 1 }, testTimeout, time.Millisecond)
	require.NoError(t, r.d.Close())
	require.NoError(t, r.d.Close())
	require.ErrorIs(t, <-errs, net.ErrClosed)
	require.ErrorIs(t, <-errs, net.ErrClosed)
}

// A VM that is paused and goes on, and one that gets another memory table, keep their streams.
func TestPauseAndMemoryChange(t *testing.T) {
	r := startRig(t, Config{})
	r.g.listen(1025, echo)
	c := r.dial(1025)
	done := make(chan error, 1)
	go func() { done <- tryRoundTrip(c, random(8<<20)) }()
	for i := 0; ; i++ {
		select {
		case err := <-done:
			require.NoError(t, err)
			t.Logf("%d changes", i)
			r.noStreams()
			return
		default:
		}
		if i%2 == 0 {
			r.fe.start(r.fe.stop())
			// As QEMU does after the start, for what came in between.
			r.fe.queues[0].notify()
			r.fe.queues[1].notify()
		} else {
			r.fe.sendMemory()
		}
	}
}

func TestGuestIgnoresClose(t *testing.T) {
	r := startRig(t, Config{CloseTimeout: 20 * time.Millisecond})
	r.g.listen(1025, func(c *guestConn) {})
	c := r.dial(1025)
	r.g.mu.Lock()
	clear(r.g.conns) // it forgets the stream, and answers nothing
	r.g.ended = true
	r.g.mu.Unlock()
	r.g.holdReplies()
	require.NoError(t, c.Close())
	r.noStreams()
}

// holdReplies lets no packet of the guest out any more.
func (g *fakeGuest) holdReplies() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.txFree = nil
}

func TestBrokenFrontEnd(t *testing.T) {
	state := func(i, n uint32) []byte { return vringState{i, n}.encode() }
	unsealed, err := unix.MemfdCreate("guest", unix.MFD_CLOEXEC)
	require.NoError(t, err)
	defer unix.Close(unsealed)
	require.NoError(t, unix.Ftruncate(unsealed, testMemory))
	for _, tc := range []struct {
		name    string
		request uint32
		payload []byte
		fd      bool
		want    string
	}{
		{"unknown request", 99, nil, false, "not supported"},
		{"features", reqSetFeatures, u64Payload(1 << 33), false, "were not offered"},
		{"protocol features", reqSetProtocolFeatures, u64Payload(1 << 5), false, "were not offered"},
		{"short features", reqSetFeatures, []byte{1}, false, "payload of 1 bytes"},
		{"no regions", reqSetMemTable, memTable(), false, "0 memory regions"},
		{"no fd", reqSetMemTable, memTable(regionSpec{0, 4096, 0, 0}), false, "0 file descriptors"},
		{"not sealed", reqSetMemTable, memTable(regionSpec{0, 4096, 0, 0}), true, "seal=on"},
		{"too large", reqSetMemTable, memTable(regionSpec{0, testMemory, 0, 4096}), true, "in a file of"},
		{"overflow", reqSetMemTable, memTable(regionSpec{0, 1 << 63, 0, 1 << 63}), true, "impossible"},
		{"overflow of user addresses", reqSetMemTable, memTable(regionSpec{0, 4096, 1<<64 - 1, 0}), true, "impossible"},
		{"queue", reqSetVringNum, state(7, 128), false, "queue 7"},
		{"size", reqSetVringNum, state(0, 1<<20), false, "size 1048576"},
		{"base", reqSetVringBase, state(0, 1<<16), false, "index 65536"},
		{"logging", reqSetVringAddr, append(state(0, 1), make([]byte, 32)...), false, "not offered"},
		{"kick without fd", reqSetVringKick, u64Payload(0), false, "0 file descriptors"},
		{"polling", reqSetVringKick, u64Payload(vringNoFD), false, "not supported"},
		{"kick is a memory file", reqSetVringKick, u64Payload(0), true, "no event fd"},
		{"config", reqGetConfig, []byte{1, 2, 3}, false, "payload of 3 bytes"},
		{"set config", 25, nil, false, "not supported"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r := newRig(t, Config{})
			var fds []int
			if tc.fd {
				fds = []int{unsealed}
			}
			require.NotZero(t, r.fe.set(tc.request, tc.payload, fds...))
			<-r.d.Done()
			require.ErrorContains(t, r.d.Err(), tc.want)
		})
	}
	t.Run("start without anything", func(t *testing.T) {
		r := newRig(t, Config{})
		r.fe.ok(reqSetVringKick, u64Payload(1), r.fe.queues[1].kickFD)
		require.NotZero(t, r.fe.set(reqSetVringEnable, state(1, 1)))
		<-r.d.Done()
		require.ErrorContains(t, r.d.Err(), "without memory")
	})
	for name, raw := range map[string][]byte{
		"version": {1, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0},
		"reply":   {1, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0},
		"length":  {1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 1, 0},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, Config{})
			_, err := r.fe.conn.Write(raw)
			require.NoError(t, err)
			<-r.d.Done()
			require.ErrorContains(t, r.d.Err(), "vhost-user")
		})
	}
}
