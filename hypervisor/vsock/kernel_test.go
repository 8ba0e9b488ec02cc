// SPDX-License-Identifier: Apache-2.0

package vsock

import (
	"context"
	"errors"
	"fmt"
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

// fakeKernel is a kernelAPI whose device is an ordinary file, with which everything goes well.
func fakeKernel(t *testing.T) kernelAPI {
	t.Helper()
	device := filepath.Join(t.TempDir(), "vhost-vsock")
	require.NoError(t, os.WriteFile(device, nil, 0o600))
	return kernelAPI{
		device: device,
		setCID: func(*os.File, uint32) error { return nil },
		listen: func(uint32) (net.Listener, error) { return newFakeListener(), nil },
	}
}

// aPort is the ready port of all guests here.
func aPort(uint32) uint32 { return 7 }

func TestNewKernel(t *testing.T) {
	ctx := context.Background()
	missing := fakeKernel(t)
	require.NoError(t, os.Remove(missing.device))
	_, err := newKernel(ctx, missing, aPort)
	require.ErrorIs(t, err, errdefs.ErrUnavailable)
	require.ErrorContains(t, err, missing.device)
	require.ErrorContains(t, err, "modprobe vhost_vsock")

	real := fakeKernel(t)
	real.setCID = setGuestCID
	_, err = newKernel(ctx, real, aPort)
	require.ErrorIs(t, err, unix.ENOTTY) // the real ioctl on a file that is no vhost device
	require.ErrorContains(t, err, real.device)

	// Another VM has the first two ids, somebody the port of the third.
	api := fakeKernel(t)
	tries := 0
	api.setCID = func(_ *os.File, cid uint32) error {
		require.GreaterOrEqual(t, cid, uint32(3))
		require.NotEqual(t, uint32(1<<32-1), cid)
		if tries++; tries < 3 {
			return unix.EADDRINUSE
		}
		return nil
	}
	var ports []uint32
	l := newFakeListener()
	api.listen = func(port uint32) (net.Listener, error) {
		ports = append(ports, port)
		switch len(ports) {
		case 1:
			return nil, os.NewSyscallError("bind", unix.EADDRINUSE)
		case 2:
			return l, nil
		}
		return newFakeListener(), nil
	}
	k, err := newKernel(ctx, api, func(cid uint32) uint32 { return cid })
	require.NoError(t, err)
	require.Equal(t, 4, tries)
	require.Len(t, ports, 2)
	require.Equal(t, k.CID(), ports[1])

	// The port is bound before anybody asks for it, and handed out once.
	first, err := k.Listen(k.CID())
	require.NoError(t, err)
	require.Equal(t, l, first.(*kernelListener).Listener)
	require.Len(t, ports, 2)
	_, err = k.Listen(k.CID())
	require.NoError(t, err)
	require.Len(t, ports, 3)
	k.ReleaseDevice()
	_, err = k.Device().Stat()
	require.ErrorIs(t, err, os.ErrClosed)
	require.NoError(t, k.Close())
	_, err = k.Listen(k.CID())
	require.ErrorIs(t, err, net.ErrClosed)
}

// What cannot be had leaves nothing, and says what was tried.
func TestNewKernelFails(t *testing.T) {
	cancelled, cancel := context.WithCancel(context.Background())
	cancel()
	for name, tc := range map[string]struct {
		ctx  context.Context
		cid  error
		port error
		is   error
		want string
	}{
		"every id is taken": {context.Background(), unix.EADDRINUSE, nil, errdefs.ErrResourceExhausted,
			"another VM of this host has context id"},
		"every port is taken": {context.Background(), nil, unix.EADDRINUSE, errdefs.ErrResourceExhausted,
			"vsock port 7 of this host: another process has it"},
		"no right to bind": {context.Background(), nil, unix.EACCES, errdefs.ErrPermissionDenied,
			"port 7 of this host: a port below 1024 needs CAP_NET_BIND_SERVICE"},
		"no vsock":  {context.Background(), nil, unix.EAFNOSUPPORT, unix.EAFNOSUPPORT, "vsock port 7"},
		"cancelled": {cancelled, nil, nil, context.Canceled, "vsock context id"},
	} {
		t.Run(name, func(t *testing.T) {
			defer goleak.VerifyNone(t)
			api := fakeKernel(t)
			var device *os.File
			api.setCID = func(f *os.File, _ uint32) error {
				device = f
				return tc.cid
			}
			api.listen = func(uint32) (net.Listener, error) { return nil, os.NewSyscallError("bind", tc.port) }
			_, err := newKernel(tc.ctx, api, aPort)
			require.ErrorIs(t, err, tc.is)
			require.ErrorContains(t, err, tc.want)
			if device != nil {
				require.ErrorIs(t, device.Close(), os.ErrClosed)
			}
		})
	}
}

// The real device, where there is one: two guests get ids and ports of their own, and a port that is taken is named.
func TestNewKernelHere(t *testing.T) {
	if _, err := os.Stat(vhostVsockDevice); err != nil {
		_, err := NewKernel(t.Context(), aPort)
		require.ErrorIs(t, err, errdefs.ErrUnavailable)
		require.ErrorContains(t, err, vhostVsockDevice)
		return
	}
	port := func(cid uint32) uint32 { return 1 + cid%1023 }
	a, err := NewKernel(t.Context(), port)
	require.NoError(t, err)
	defer a.Close()
	b, err := NewKernel(t.Context(), port)
	require.NoError(t, err)
	defer b.Close()
	require.NotEqual(t, a.CID(), b.CID())
	require.NotEqual(t, port(a.CID()), port(b.CID()))
	_, err = b.Listen(port(a.CID()))
	require.ErrorIs(t, err, errdefs.ErrAlreadyExists)
	require.ErrorContains(t, err, fmt.Sprintf("vsock port %d of this host: another process has it", port(a.CID())))
	_, err = NewKernel(t.Context(), func(uint32) uint32 { return port(a.CID()) })
	require.ErrorIs(t, err, errdefs.ErrResourceExhausted)
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

func newFakeListener() *fakeListener {
	return &fakeListener{conns: make(chan net.Conn, 2), done: make(chan struct{})}
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
	var results []error
	var peer net.Conn
	api := fakeKernel(t)
	var guest uint32
	api.dial = func(ctx context.Context, cid, port uint32) (Conn, error) {
		require.Equal(t, guest, cid)
		if len(results) > 0 {
			err := results[0]
			results = results[1:]
			return nil, err
		}
		_, limited := ctx.Deadline()
		require.False(t, limited, "its cancel would go unseen")
		if port == 9 {
			<-ctx.Done()
			return nil, ctx.Err()
		}
		var c net.Conn
		c, peer = net.Pipe()
		return fakeConn{c, cid}, nil
	}
	k, err := newKernel(t.Context(), api, aPort)
	require.NoError(t, err)
	guest = k.CID()
	results = []error{os.NewSyscallError("connect", syscall.ECONNRESET)}
	_, err = k.Dial(t.Context(), 1025)
	require.ErrorIs(t, err, ErrRefused)
	require.ErrorIs(t, err, syscall.ECONNRESET)
	results = []error{syscall.ENODEV}
	_, err = k.Dial(t.Context(), 1025)
	require.ErrorIs(t, err, syscall.ENODEV)
	require.ErrorContains(t, err, fmt.Sprintf("port 1025 of the guest with context id %d", guest))

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
		limited, cancel := context.WithTimeout(context.Background(), time.Hour)
		defer cancel()
		_, err := k.Dial(limited, 9)
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
	l := newFakeListener()
	inUse := false
	api := fakeKernel(t)
	api.listen = func(port uint32) (net.Listener, error) {
		if inUse {
			return nil, os.NewSyscallError("bind", syscall.EADDRINUSE)
		}
		if port == 1024 {
			return l, nil
		}
		return newFakeListener(), nil
	}
	k, err := newKernel(t.Context(), api, aPort)
	require.NoError(t, err)
	kl, err := k.Listen(1024)
	require.NoError(t, err)
	inUse = true
	_, err = k.Listen(1024)
	require.ErrorIs(t, err, errdefs.ErrAlreadyExists)

	stranger, strangersEnd := net.Pipe()
	guest, guestsEnd := net.Pipe()
	l.conns <- fakeConn{stranger, k.CID() - 1}
	l.conns <- fakeConn{guest, k.CID()}
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
