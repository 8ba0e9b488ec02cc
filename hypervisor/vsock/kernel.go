// SPDX-License-Identifier: Apache-2.0

package vsock

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"net"
	"os"
	"sync"
	"syscall"

	"github.com/containerd/errdefs"
	mdlayher "github.com/mdlayher/vsock"
	"golang.org/x/sys/unix"
)

const (
	// vhostVsockDevice is the kernel's vhost-vsock control device (module vhost_vsock).
	vhostVsockDevice = "/dev/vhost-vsock"
	// vhostVsockSetGuestCID is VHOST_VSOCK_SET_GUEST_CID of linux/vhost.h: _IOW(0xAF, 0x60, __u64).
	vhostVsockSetGuestCID = 0x4008AF60
	// firstGuestCID and lastGuestCID are what a guest gets: 0 to 2 are reserved, and 2^32-1 means any.
	firstGuestCID = 3
	lastGuestCID  = 1<<31 - 1
	// reserveAttempts bounds the search; with random ids even two attempts are rare.
	reserveAttempts = 64
)

// Kernel is the Transport over the kernel's vhost-vsock, to one guest: it holds the guest's context id, and the port of the
// host where this guest says that it is ready.
//
// Ports of listeners belong to the host, not to a VM: with this transport two VMs on a host cannot have a listener on
// the same port. Connections of other VMs and of the host's own processes are closed.
type Kernel struct {
	cid    uint32
	device *os.File
	dial   func(ctx context.Context, cid, port uint32) (Conn, error)
	listen func(port uint32) (net.Listener, error)

	ctx  context.Context // ends with Close
	stop context.CancelFunc

	mu     sync.Mutex
	open   map[interface{ Close() error }]struct{} // nil once closed
	closed bool
	// ready is the listener that was bound with the context id, until Listen hands it out.
	ready     *kernelListener
	readyPort uint32
}

var _ Transport = (*Kernel)(nil)

// kernelAPI is what Kernel needs of the kernel, replaced in tests.
type kernelAPI struct {
	device string
	setCID func(*os.File, uint32) error
	dial   func(ctx context.Context, cid, port uint32) (Conn, error)
	listen func(port uint32) (net.Listener, error)
}

// NewKernel reserves a context id that no VM on this host uses, with the port of the host that readyPort gives for it:
// both are this guest's before its VMM starts. The id is free again once all copies of Device are closed.
//
// It fails with errdefs.ErrUnavailable where the kernel has no vhost-vsock, with errdefs.ErrPermissionDenied where this
// process may not use it or not bind the port (below 1024: CAP_NET_BIND_SERVICE), and with errdefs.ErrResourceExhausted,
// naming a port that somebody else has, when all that it tries are taken.
func NewKernel(ctx context.Context, readyPort func(cid uint32) uint32) (*Kernel, error) {
	return newKernel(ctx, kernelAPI{device: vhostVsockDevice, setCID: setGuestCID, dial: dialKernel, listen: listenKernel}, readyPort)
}

func newKernel(ctx context.Context, api kernelAPI, readyPort func(cid uint32) uint32) (_ *Kernel, err error) {
	f, err := os.OpenFile(api.device, os.O_RDWR|unix.O_CLOEXEC, 0)
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ENODEV), errors.Is(err, unix.ENXIO):
		return nil, fmt.Errorf("no vhost-vsock on this host (%w); load the module with `modprobe vhost_vsock`, "+
			"or choose the vhost-user transport: %w", err, errdefs.ErrUnavailable)
	case errors.Is(err, fs.ErrPermission):
		return nil, fmt.Errorf("vhost-vsock is not permitted (%w); run as root or give this user access to %s: %w",
			err, api.device, errdefs.ErrPermissionDenied)
	case err != nil:
		return nil, fmt.Errorf("vhost-vsock: %w", err)
	}
	k := &Kernel{device: f, dial: api.dial, listen: api.listen, open: make(map[interface{ Close() error }]struct{})}
	k.ctx, k.stop = context.WithCancel(context.Background())
	defer func() {
		if err != nil {
			err = errors.Join(err, k.Close())
		}
	}()
	var taken error
	for range reserveAttempts {
		if err := ctx.Err(); err != nil {
			return nil, fmt.Errorf("vsock context id: %w", err)
		}
		// The device keeps the last id that was set.
		k.cid = firstGuestCID + rand.Uint32N(lastGuestCID-firstGuestCID+1)
		switch err := api.setCID(f, k.cid); {
		case errors.Is(err, unix.EADDRINUSE):
			taken = fmt.Errorf("another VM of this host has context id %d", k.cid)
			continue
		case err != nil:
			return nil, fmt.Errorf("set vsock context id %d at %s: %w", k.cid, api.device, err)
		}
		port := readyPort(k.cid)
		l, err := k.Listen(port)
		switch {
		case errdefs.IsAlreadyExists(err):
			taken = err
			continue
		case err != nil:
			return nil, err
		}
		k.ready, k.readyPort = l.(*kernelListener), port
		return k, nil
	}
	return nil, fmt.Errorf("no vsock context id with a free port after %d attempts, of which the last: %w: %w",
		reserveAttempts, taken, errdefs.ErrResourceExhausted)
}

// CID is the guest's context id.
func (k *Kernel) CID() uint32 { return k.cid }

// Device is the open /dev/vhost-vsock that holds the context id, for the VMM (QEMU: `-device
// vhost-vsock-pci,guest-cid=CID,vhostfd=N`). It stays the transport's.
func (k *Kernel) Device() *os.File { return k.device }

// ReleaseDevice closes this process's copy of the device, when the VMM has one of its own: the kernel ends the guest's
// connections, and frees its memory, with the last copy.
func (k *Kernel) ReleaseDevice() { _ = k.device.Close() }

func dialKernel(ctx context.Context, cid, port uint32) (Conn, error) {
	c, err := mdlayher.DialContext(ctx, cid, port, nil)
	if err != nil {
		return nil, err
	}
	return c, nil
}

func listenKernel(port uint32) (net.Listener, error) {
	l, err := mdlayher.ListenContextID(HostCID, port, nil)
	if err != nil {
		return nil, err
	}
	return l, nil
}

// setGuestCID hands the kernel a pointer to a 64-bit id.
func setGuestCID(f *os.File, cid uint32) error {
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var errno error
	err = raw.Control(func(fd uintptr) { errno = ioctlSetCID(fd, uint64(cid)) })
	return errors.Join(err, errno)
}

// Dial implements Transport.
func (k *Kernel) Dial(ctx context.Context, port uint32) (Conn, error) {
	// Package mdlayher/socket watches a context that has a deadline for nothing else, so that Close and the caller's cancel
	// would have to wait for it: dial gets one without.
	dialling, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	defer context.AfterFunc(ctx, cancel)()
	defer context.AfterFunc(k.ctx, cancel)()
	for {
		c, err := k.dial(dialling, k.cid, port)
		switch {
		case err == nil:
			return k.keep(c)
		case k.ctx.Err() != nil:
			err = net.ErrClosed
		case ctx.Err() != nil:
			err = ctx.Err()
		case errors.Is(err, syscall.ETIMEDOUT):
			// The kernel gives up after 2 seconds (VSOCK_DEFAULT_CONNECT_TIMEOUT); a guest may take longer to start.
			continue
		case errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.ECONNREFUSED):
			err = fmt.Errorf("%w (%w)", ErrRefused, err)
		}
		return nil, fmt.Errorf("dial vsock port %d of the guest with context id %d: %w", port, k.cid, err)
	}
}

func (k *Kernel) keep(c Conn) (Conn, error) {
	kc := &kernelConn{Conn: c, k: k}
	if err := k.add(kc); err != nil {
		return nil, errors.Join(err, c.Close())
	}
	return kc, nil
}

func (k *Kernel) add(c interface{ Close() error }) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.closed {
		return net.ErrClosed
	}
	k.open[c] = struct{}{}
	return nil
}

func (k *Kernel) remove(c interface{ Close() error }) {
	k.mu.Lock()
	defer k.mu.Unlock()
	delete(k.open, c)
}

// Listen implements Transport. The port that was reserved with the context id is bound already.
func (k *Kernel) Listen(port uint32) (net.Listener, error) {
	if l := k.reserved(port); l != nil {
		return l, nil
	}
	l, err := k.listen(port)
	switch {
	case errors.Is(err, syscall.EADDRINUSE):
		return nil, fmt.Errorf("listen on vsock port %d of this host: another process has it (%w): %w", port, err, errdefs.ErrAlreadyExists)
	case errors.Is(err, fs.ErrPermission):
		return nil, fmt.Errorf("listen on vsock port %d of this host: a port below 1024 needs CAP_NET_BIND_SERVICE, as root has it (%w): %w",
			port, err, errdefs.ErrPermissionDenied)
	case err != nil:
		return nil, fmt.Errorf("listen on vsock port %d of this host: %w", port, err)
	}
	kl := &kernelListener{Listener: l, k: k}
	if err := k.add(kl); err != nil {
		return nil, fmt.Errorf("listen on vsock port %d of this host: %w", port, errors.Join(err, l.Close()))
	}
	return kl, nil
}

// reserved hands out the listener that was bound with the context id, once.
func (k *Kernel) reserved(port uint32) net.Listener {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.ready == nil || k.closed || port != k.readyPort {
		return nil
	}
	l := k.ready
	k.ready = nil
	return l
}

// Close implements Transport. It closes Device as well.
func (k *Kernel) Close() error {
	k.stop()
	k.mu.Lock()
	open := k.open
	k.open, k.closed = nil, true
	k.mu.Unlock()
	k.ReleaseDevice()
	var errs []error
	for c := range open {
		errs = append(errs, c.Close())
	}
	return errors.Join(errs...)
}

// kernelConn may be closed more than once.
type kernelConn struct {
	Conn
	k    *Kernel
	once sync.Once
	err  error
}

func (c *kernelConn) Close() error {
	c.once.Do(func() {
		c.k.remove(c)
		c.err = c.Conn.Close()
	})
	return c.err
}

// kernelListener accepts connections of one guest.
type kernelListener struct {
	net.Listener
	k    *Kernel
	once sync.Once
	err  error
}

func (l *kernelListener) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		vc, ok := c.(Conn)
		if a, isVsock := c.RemoteAddr().(*mdlayher.Addr); !ok || !isVsock || a.ContextID != l.k.cid {
			_ = c.Close() // another VM, or a process of this host
			continue
		}
		return l.k.keep(vc)
	}
}

func (l *kernelListener) Close() error {
	l.once.Do(func() {
		l.k.remove(l)
		l.err = l.Listener.Close()
	})
	return l.err
}
