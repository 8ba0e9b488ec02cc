// SPDX-License-Identifier: Apache-2.0

package vsock

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"github.com/containerd/errdefs"
	mdlayher "github.com/mdlayher/vsock"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

func TestSetGuestCIDNumber(t *testing.T) {
	// _IOW(type, nr, size) of asm-generic/ioctl.h.
	const iocWrite, vhostVirtio, nr = 1, 0xAF, 0x60
	want := uint64(iocWrite)<<30 | uint64(unsafe.Sizeof(uint64(0)))<<16 | vhostVirtio<<8 | nr
	require.EqualValues(t, want, vhostVsockSetGuestCID)
}

func TestAllocateCID(t *testing.T) {
	ctx := context.Background()
	dev := filepath.Join(t.TempDir(), "vhost-vsock")
	_, _, err := allocateCID(ctx, dev, nil)
	require.ErrorIs(t, err, errdefs.ErrUnavailable)
	require.ErrorContains(t, err, dev)
	require.ErrorContains(t, err, "modprobe vhost_vsock")

	require.NoError(t, os.WriteFile(dev, nil, 0o600))
	_, _, err = allocateCID(ctx, dev, setGuestCID)
	require.ErrorIs(t, err, unix.ENOTTY) // the real ioctl on a file that is no vhost device
	require.ErrorContains(t, err, dev)

	tries := 0
	cid, f, err := allocateCID(ctx, dev, func(_ *os.File, cid uint32) error {
		require.GreaterOrEqual(t, cid, uint32(3))
		require.NotEqual(t, uint32(1<<32-1), cid)
		if tries++; tries < 3 {
			return unix.EADDRINUSE
		}
		return nil
	})
	require.NoError(t, err)
	require.NotZero(t, cid)
	require.Equal(t, 3, tries)
	require.NoError(t, f.Close())

	var held *os.File
	_, _, err = allocateCID(ctx, dev, func(f *os.File, _ uint32) error {
		held = f
		return unix.EADDRINUSE
	})
	require.ErrorIs(t, err, errdefs.ErrResourceExhausted)
	require.ErrorIs(t, held.Close(), os.ErrClosed)

	cancelled, cancel := context.WithCancel(ctx)
	cancel()
	_, _, err = allocateCID(cancelled, dev, nil)
	require.ErrorIs(t, err, context.Canceled)
}

func TestAllocateCIDHere(t *testing.T) {
	if _, err := os.Stat(vhostVsockDevice); err == nil {
		cid, f, err := AllocateCID(t.Context())
		require.NoError(t, err)
		require.GreaterOrEqual(t, cid, uint32(3))
		require.NoError(t, f.Close())
		return
	}
	_, _, err := AllocateCID(t.Context())
	require.ErrorIs(t, err, errdefs.ErrUnavailable)
	require.ErrorContains(t, err, vhostVsockDevice)
}

// fakeConn is a pipe that looks like a vsock connection.
type fakeConn struct {
	net.Conn
	cid uint32
}

func (c fakeConn) CloseRead() error     { return nil }
func (c fakeConn) CloseWrite() error    { return nil }
func (c fakeConn) RemoteAddr() net.Addr { return &mdlayher.Addr{ContextID: c.cid, Port: 77} }

type fakeListener struct {
	conns chan net.Conn
	done  chan struct{}
}

func (l *fakeListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}
func (l *fakeListener) Close() error   { close(l.done); return nil }
func (l *fakeListener) Addr() net.Addr { return &mdlayher.Addr{ContextID: HostCID, Port: 1024} }

func TestKernelDial(t *testing.T) {
	defer goleak.VerifyNone(t)
	_, err := NewKernel(2)
	require.ErrorIs(t, err, errdefs.ErrInvalidArgument)

	var results []error
	var peer net.Conn
	k := newKernel(5, func(ctx context.Context, cid, port uint32) (Conn, error) {
		require.EqualValues(t, 5, cid)
		if len(results) > 0 {
			err := results[0]
			results = results[1:]
			return nil, err
		}
		if port == 9 {
			<-ctx.Done()
			return nil, ctx.Err()
		}
		var c net.Conn
		c, peer = net.Pipe()
		return fakeConn{c, cid}, nil
	}, nil)
	results = []error{os.NewSyscallError("connect", syscall.ECONNRESET)}
	_, err = k.Dial(t.Context(), 1025)
	require.ErrorIs(t, err, ErrRefused)
	require.ErrorIs(t, err, syscall.ECONNRESET)
	results = []error{syscall.ENODEV}
	_, err = k.Dial(t.Context(), 1025)
	require.ErrorIs(t, err, syscall.ENODEV)
	require.ErrorContains(t, err, "port 1025 of the guest with context id 5")

	results = []error{syscall.ETIMEDOUT, os.NewSyscallError("connect", syscall.ETIMEDOUT)}
	c, err := k.Dial(t.Context(), 1025)
	require.NoError(t, err)
	require.Empty(t, results)

	ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	_, err = k.Dial(ctx, 9)
	require.ErrorIs(t, err, context.DeadlineExceeded)

	dialled := make(chan error, 1)
	go func() {
		_, err := k.Dial(context.Background(), 9)
		dialled <- err
	}()
	require.NoError(t, k.Close())
	require.ErrorIs(t, <-dialled, net.ErrClosed)
	_, err = peer.Read(make([]byte, 1))
	require.ErrorIs(t, err, io.EOF, "Close ends the connections")
	require.NoError(t, c.Close())
	_, err = k.Dial(t.Context(), 1025)
	require.ErrorIs(t, err, net.ErrClosed)
}

func TestKernelListen(t *testing.T) {
	defer goleak.VerifyNone(t)
	l := &fakeListener{conns: make(chan net.Conn, 2), done: make(chan struct{})}
	inUse := false
	k := newKernel(5, nil, func(port uint32) (net.Listener, error) {
		if inUse {
			return nil, os.NewSyscallError("bind", syscall.EADDRINUSE)
		}
		return l, nil
	})
	kl, err := k.Listen(1024)
	require.NoError(t, err)
	inUse = true
	_, err = k.Listen(1024)
	require.ErrorIs(t, err, errdefs.ErrAlreadyExists)

	stranger, strangersEnd := net.Pipe()
	guest, guestsEnd := net.Pipe()
	l.conns <- fakeConn{stranger, 6}
	l.conns <- fakeConn{guest, 5}
	c, err := kl.Accept()
	require.NoError(t, err)
	require.Implements(t, (*Conn)(nil), c)
	_, err = strangersEnd.Read(make([]byte, 1))
	require.ErrorIs(t, err, io.EOF, "another VM is turned away")

	require.NoError(t, k.Close())
	_, err = guestsEnd.Read(make([]byte, 1))
	require.ErrorIs(t, err, io.EOF)
	_, err = kl.Accept()
	require.ErrorIs(t, err, net.ErrClosed)
	require.NoError(t, kl.Close())
	require.True(t, errors.Is(k.add(c), net.ErrClosed))
}

func TestAddr(t *testing.T) {
	require.Equal(t, "host:1024", Addr{CID: HostCID, Port: 1024}.String())
	require.Equal(t, "vm(7):1", Addr{CID: 7, Port: 1}.String())
	require.Equal(t, "vsock", Addr{}.Network())
}
