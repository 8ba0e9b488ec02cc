// SPDX-License-Identifier: Apache-2.0

package vhostuser

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/sirupsen/logrus"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/cloister-project/cloister/hypervisor/vsock"
)

const testTimeout = 20 * time.Second

type rig struct {
	t  testing.TB
	d  *Device
	fe *frontEnd
	g  *fakeGuest
}

// newRig returns a device and a guest whose driver is not up yet.
func newRig(t testing.TB, cfg Config) *rig {
	t.Helper()
	t.Cleanup(func() { goleak.VerifyNone(t) })
	cfg.GuestCID = testCID
	quiet := logrus.New()
	quiet.SetOutput(io.Discard)
	cfg.Logger = logrus.NewEntry(quiet)
	d, err := New(cfg)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, d.Close()) })
	fe := newFrontEnd(t, d)
	fe.negotiate()
	return &rig{t: t, d: d, fe: fe, g: newFakeGuest(t, fe)}
}

func startRig(t testing.TB, cfg Config) *rig {
	t.Helper()
	r := newRig(t, cfg)
	r.fe.start([2]uint32{})
	r.g.run(64)
	return r
}

func (r *rig) dial(port uint32) vsock.Conn {
	r.t.Helper()
	c, err := r.tryDial(port)
	require.NoError(r.t, err)
	r.t.Cleanup(func() { _ = c.Close() })
	require.NoError(r.t, c.SetDeadline(time.Now().Add(testTimeout)))
	return c
}

func (r *rig) tryDial(port uint32) (vsock.Conn, error) {
	ctx, cancel := context.WithTimeout(context.Background(), testTimeout)
	defer cancel()
	return r.d.Dial(ctx, port)
}

// streams is how many the device knows.
func (r *rig) streams() int {
	r.d.mu.Lock()
	defer r.d.mu.Unlock()
	return len(r.d.streams)
}

func (r *rig) noStreams() {
	r.t.Helper()
	require.Eventually(r.t, func() bool { return r.streams() == 0 }, testTimeout, time.Millisecond)
}

func echo(c *guestConn) {
	_, _ = io.Copy(c, c)
	c.CloseWrite()
	c.Close()
}

func random(n int) []byte {
	b := make([]byte, n)
	var seed [32]byte
	_, _ = rand.NewChaCha8(seed).Read(b)
	return b
}

func TestDialEcho(t *testing.T) {
	r := startRig(t, Config{})
	r.g.listen(1025, echo)
	c := r.dial(1025)
	require.Equal(t, "vm(42):1025", c.RemoteAddr().String())
	_, err := c.Write([]byte("hello"))
	require.NoError(t, err)
	require.NoError(t, c.CloseWrite())
	require.NoError(t, c.CloseWrite())
	_, err = c.Write([]byte("x"))
	require.ErrorIs(t, err, syscall.EPIPE)
	b, err := io.ReadAll(c)
	require.NoError(t, err)
	require.Equal(t, "hello", string(b))
	require.NoError(t, c.Close())
	require.NoError(t, c.Close())
	_, err = c.Read(b)
	require.ErrorIs(t, err, net.ErrClosed)
	_, err = c.Write(b)
	require.ErrorIs(t, err, net.ErrClosed)
	r.noStreams()
}

func TestDialRefused(t *testing.T) {
	r := startRig(t, Config{})
	_, err := r.tryDial(9)
	require.ErrorIs(t, err, vsock.ErrRefused)
	r.noStreams()
}

func TestDialBeforeDriver(t *testing.T) {
	r := newRig(t, Config{})
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Millisecond)
	defer cancel()
	_, err := r.d.Dial(ctx, 1025)
	require.ErrorIs(t, err, context.DeadlineExceeded)
	require.ErrorContains(t, err, "driver has not started")
	require.Zero(t, r.streams())

	r.g.listen(1025, echo)
	done := make(chan error, 1)
	go func() {
		c, err := r.tryDial(1025)
		if err == nil {
			err = c.Close()
		}
		done <- err
	}()
	require.Eventually(t, func() bool { return r.streams() == 1 }, testTimeout, time.Millisecond)
	r.fe.start([2]uint32{})
	r.g.run(4)
	require.NoError(t, <-done)
	r.noStreams()
	r.g.mu.Lock()
	defer r.g.mu.Unlock()
	require.EqualValues(t, opRequest, r.g.stray[0].op, "of the cancelled request nothing was sent")
	for _, h := range r.g.stray[1:] {
		require.NotEqualValues(t, opRequest, h.op)
	}
}

func TestDialCancelled(t *testing.T) {
	r := newRig(t, Config{})
	r.fe.start([2]uint32{})
	// A guest that takes the request and says nothing: its handler does not run yet.
	off := buffer{txArea - rxBufSize, rxBufSize}
	r.g.mu.Lock()
	r.g.addRx([]buffer{off})
	r.g.rx.publish()
	r.g.mu.Unlock()
	ctx, cancel := context.WithCancel(context.Background())
	time.AfterFunc(20*time.Millisecond, cancel)
	_, err := r.d.Dial(ctx, 1025)
	require.ErrorIs(t, err, context.Canceled)
	require.ErrorContains(t, err, "has not answered")
	require.Zero(t, r.streams())
	// The late answer is met with a reset.
	r.g.listen(1025, func(c *guestConn) {})
	r.g.run(1)
	require.Eventually(t, func() bool {
		r.g.mu.Lock()
		defer r.g.mu.Unlock()
		return len(r.g.stray) > 0 && len(r.g.conns) == 0
	}, testTimeout, time.Millisecond)
}

func TestListen(t *testing.T) {
	r := startRig(t, Config{})
	l, err := r.d.Listen(1024)
	require.NoError(t, err)
	_, err = r.d.Listen(1024)
	require.ErrorIs(t, err, errdefs.ErrAlreadyExists)
	_, err = r.g.dial(1023)
	require.ErrorIs(t, err, errGuestReset)

	gc, err := r.g.dial(1024)
	require.NoError(t, err)
	data := random(backlogBuffer)
	_, err = gc.Write(data)
	require.NoError(t, err)
	gc.CloseWrite()
	c, err := l.Accept()
	require.NoError(t, err)
	require.Equal(t, "host:1024", c.LocalAddr().String())
	got, err := io.ReadAll(c)
	require.NoError(t, err)
	require.True(t, bytes.Equal(data, got))
	_, err = c.Write([]byte("answer"))
	require.NoError(t, err)
	require.NoError(t, c.(vsock.Conn).CloseWrite())
	got, err = io.ReadAll(gc)
	require.NoError(t, err)
	require.Equal(t, "answer", string(got))
	require.True(t, gc.Close())
	require.NoError(t, c.Close())

	accepted := make(chan error, 1)
	go func() {
		_, err := l.Accept()
		accepted <- err
	}()
	require.NoError(t, l.Close())
	require.NoError(t, l.Close())
	require.ErrorIs(t, <-accepted, net.ErrClosed)
	l, err = r.d.Listen(1024)
	require.NoError(t, err)
	require.NoError(t, l.Close())
	r.noStreams()
}

// The answer to a request comes first, however fast the connection is accepted and used.
func TestAcceptAtOnce(t *testing.T) {
	r := startRig(t, Config{BufferSize: backlogBuffer})
	l, err := r.d.Listen(1024)
	require.NoError(t, err)
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			_, _ = c.Write([]byte("x"))
			_ = c.Close()
		}
	})
	for range 500 {
		gc, err := r.g.dial(1024)
		require.NoError(t, err)
		b, err := io.ReadAll(gc)
		require.NoError(t, err)
		require.Equal(t, "x", string(b))
		gc.Close()
	}
	require.NoError(t, l.Close())
	wg.Wait()
	r.noStreams()
}

// The same with the goroutine of the guest's packets stopped where it matters.
func TestAnswerIsPendingBeforeAccept(t *testing.T) {
	d := bareDevice(t, Config{})
	defer d.fail(net.ErrClosed)
	l, err := d.Listen(1024)
	require.NoError(t, err)
	d.rx.mu.Lock()
	var wg sync.WaitGroup
	wg.Go(func() { d.accept(portPair{host: 1024, guest: 1}, &packetHeader{op: opRequest}) })
	s := <-l.(*listener).backlog
	pending := s.ctrl
	d.rx.mu.Unlock()
	wg.Wait()
	require.EqualValues(t, ctrlResponse, pending)
	require.Equal(t, []*stream{s}, d.rx.control)
}

func TestBacklogIsBounded(t *testing.T) {
	r := startRig(t, Config{})
	l, err := r.d.Listen(1024)
	require.NoError(t, err)
	for range maxBacklog {
		_, err := r.g.dial(1024)
		require.NoError(t, err)
	}
	_, err = r.g.dial(1024)
	require.ErrorIs(t, err, errGuestReset)
	require.NoError(t, l.Close())
	r.noStreams()
}

func TestStreamLimit(t *testing.T) {
	r := startRig(t, Config{MaxStreams: 2})
	r.g.listen(1025, echo)
	_, err := r.d.Listen(1024)
	require.NoError(t, err)
	c := r.dial(1025)
	r.dial(1025)
	_, err = r.tryDial(1025)
	require.ErrorIs(t, err, errdefs.ErrResourceExhausted)
	_, err = r.g.dial(1024)
	require.ErrorIs(t, err, errGuestReset)
	require.NoError(t, c.Close())
	require.Eventually(t, func() bool { return r.streams() == 1 }, testTimeout, time.Millisecond)
	r.dial(1025)
}

func TestGuestCloseKeepsData(t *testing.T) {
	r := startRig(t, Config{})
	data := random(100 << 10)
	r.g.listen(1025, func(c *guestConn) {
		_, _ = c.Write(data)
		c.Close()
	})
	c := r.dial(1025)
	r.noStreams() // closed by the guest, all of it received
	got, err := io.ReadAll(c)
	require.NoError(t, err)
	require.True(t, bytes.Equal(data, got))
	_, err = c.Write([]byte("x"))
	require.ErrorIs(t, err, syscall.EPIPE)
}

func TestHostCloseKeepsData(t *testing.T) {
	r := startRig(t, Config{})
	got := make(chan []byte, 1)
	closed := make(chan struct{})
	r.g.listen(1025, func(c *guestConn) {
		<-closed // all of it waits in the guest's buffer
		b, _ := io.ReadAll(c)
		got <- b
		c.Close()
	})
	c := r.dial(1025)
	data := random(guestBufAlloc)
	_, err := c.Write(data)
	require.NoError(t, err)
	require.NoError(t, c.Close())
	close(closed)
	require.True(t, bytes.Equal(data, <-got))
	r.noStreams()
}

func TestGuestReset(t *testing.T) {
	r := startRig(t, Config{})
	conns := make(chan *guestConn, 1)
	r.g.listen(1025, func(c *guestConn) { conns <- c })
	c := r.dial(1025)
	gc := <-conns
	_, err := gc.Write([]byte("last words"))
	require.NoError(t, err)
	r.g.inject(packetHeader{op: opReset, srcPort: gc.ports.guest, dstPort: gc.ports.host}, nil)
	got, err := io.ReadAll(c)
	require.ErrorIs(t, err, syscall.ECONNRESET)
	require.Equal(t, "last words", string(got))
	_, err = c.Write([]byte("x"))
	require.ErrorIs(t, err, syscall.ECONNRESET)
	r.noStreams()
}

func TestHostHalfCloseRead(t *testing.T) {
	r := startRig(t, Config{})
	result := make(chan error, 1)
	r.g.listen(1025, func(c *guestConn) {
		for {
			if _, err := c.Write(make([]byte, 1000)); err != nil {
				result <- err
				break
			}
		}
		_, err := io.Copy(io.Discard, c)
		result <- err
		c.Close()
	})
	c := r.dial(1025)
	_, err := io.ReadFull(c, make([]byte, 100))
	require.NoError(t, err)
	require.NoError(t, c.CloseRead())
	_, err = c.Read(make([]byte, 1))
	require.ErrorIs(t, err, io.EOF)
	require.ErrorIs(t, <-result, errGuestReset)
	_, err = c.Write(random(300 << 10))
	require.NoError(t, err)
	require.NoError(t, c.CloseWrite())
	require.NoError(t, <-result)
	require.NoError(t, c.Close())
	r.noStreams()
}

func TestGuestHalfCloseRead(t *testing.T) {
	r := startRig(t, Config{})
	r.g.listen(1025, func(c *guestConn) { c.shutdown(shutReceive) })
	c := r.dial(1025)
	var err error
	for err == nil {
		_, err = c.Write(make([]byte, 4096))
	}
	require.ErrorIs(t, err, syscall.EPIPE)
}

func TestDeadlines(t *testing.T) {
	r := startRig(t, Config{})
	conns := make(chan *guestConn, 1)
	r.g.listen(1025, func(c *guestConn) { conns <- c })
	c := r.dial(1025)
	gc := <-conns
	require.NoError(t, c.SetReadDeadline(time.Now().Add(10*time.Millisecond)))
	_, err := c.Read(make([]byte, 1))
	require.ErrorIs(t, err, os.ErrDeadlineExceeded)
	var ne net.Error
	require.True(t, errors.As(err, &ne) && ne.Timeout())

	// A deadline that is set during a read.
	require.NoError(t, c.SetReadDeadline(time.Time{}))
	done := make(chan error, 1)
	go func() {
		_, err := c.Read(make([]byte, 1))
		done <- err
	}()
	require.NoError(t, c.SetReadDeadline(time.Unix(1, 0)))
	require.ErrorIs(t, <-done, os.ErrDeadlineExceeded)

	// The guest does not read: the write stops with its credit.
	require.NoError(t, c.SetWriteDeadline(time.Now().Add(50*time.Millisecond)))
	n, err := c.Write(make([]byte, 2*guestBufAlloc))
	require.ErrorIs(t, err, os.ErrDeadlineExceeded)
	require.Equal(t, guestBufAlloc, n)
	require.NoError(t, c.SetDeadline(time.Now().Add(testTimeout)))
	go func() { _, _ = io.Copy(io.Discard, gc) }()
	_, err = c.Write(make([]byte, 2*guestBufAlloc))
	require.NoError(t, err)
	require.NoError(t, c.CloseWrite())
	_, err = gc.Write([]byte("x"))
	require.NoError(t, err)
	_, err = c.Read(make([]byte, 1))
	require.NoError(t, err)
}
