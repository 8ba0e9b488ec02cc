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
	// firstGuestCID and lastGuestCID are what a guest gets: 0 to 2 are reserved, and wire.ReadyPort adds to the number.
	firstGuestCID = 3
	lastGuestCID  = 1<<31 - 1
	// cidAttempts bounds the search; with random ids even two attempts are rare.
	cidAttempts = 64
)

// AllocateCID reserves a context id that no VM on this host uses, and returns the open vhost-vsock device that holds it:
// it is passed to QEMU as vhostfd (`-device vhost-vsock-pci,guest-cid=CID,vhostfd=N`). The id is free again once all
// copies of the file are closed. It fails with errdefs.ErrUnavailable where the kernel has no vhost-vsock.
func AllocateCID(ctx context.Context) (uint32, *os.File, error) {
	return allocateCID(ctx, vhostVsockDevice, setGuestCID)
}

func allocateCID(ctx context.Context, device string, set func(*os.File, uint32) error) (cid uint32, _ *os.File, err error) {
	f, err := os.OpenFile(device, os.O_RDWR|unix.O_CLOEXEC, 0)
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ENODEV), errors.Is(err, unix.ENXIO):
		return 0, nil, fmt.Errorf("no vhost-vsock on this host (%w); load the module with `modprobe vhost_vsock`, "+
			"or choose the vhost-user transport: %w", err, errdefs.ErrUnavailable)
	case errors.Is(err, fs.ErrPermission):
		return 0, nil, fmt.Errorf("vhost-vsock is not permitted (%w); run as root or give this user access to %s: %w",
			err, device, errdefs.ErrPermissionDenied)
	case err != nil:
		return 0, nil, fmt.Errorf("vhost-vsock: %w", err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, f.Close())
		}
	}()
	for range cidAttempts {
		if err := ctx.Err(); err != nil {
			return 0, nil, fmt.Errorf("vsock context id: %w", err)
		}
		cid := firstGuestCID + rand.Uint32N(lastGuestCID-firstGuestCID+1)
		switch err := set(f, cid); {
		case err == nil:
			return cid, f, nil
		case !errors.Is(err, unix.EADDRINUSE):
			return 0, nil, fmt.Errorf("set vsock context id %d at %s: %w", cid, device, err)
		}
	}
	return 0, nil, fmt.Errorf("%d random vsock context ids are all in use at %s: %w", cidAttempts, device, errdefs.ErrResourceExhausted)
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

// Kernel is the Transport over the kernel's vhost-vsock.
//
// Ports of listeners belong to the host, not to a VM: with this transport two VMs on a host cannot have a listener on
// the same port. Connections of other VMs are closed.
type Kernel struct {
	cid    uint32
	dial   func(ctx context.Context, cid, port uint32) (Conn, error)
	listen func(port uint32) (net.Listener, error)

	ctx  context.Context // ends with Close
	stop context.CancelFunc

	mu     sync.Mutex
	open   map[interface{ Close() error }]struct{} // nil once closed
	closed bool
}

var _ Transport = (*Kernel)(nil)

// NewKernel returns the transport to the guest with a context id, such as AllocateCID gave.
func NewKernel(cid uint32) (*Kernel, error) {
	if cid < firstGuestCID || cid > lastGuestCID {
		return nil, fmt.Errorf("vsock context id %d for a guest: %d to %d are possible: %w",
			cid, firstGuestCID, uint32(lastGuestCID), errdefs.ErrInvalidArgument)
	}
	return newKernel(cid,
		func(ctx context.Context, cid, port uint32) (Conn, error) {
			c, err := mdlayher.DialContext(ctx, cid, port, nil)
			if err != nil {
				return nil, err
			}
			return c, nil
		},
		func(port uint32) (net.Listener, error) {
			l, err := mdlayher.ListenContextID(HostCID, port, nil)
			if err != nil {
				return nil, err
			}
			return l, nil
		}), nil
}

func newKernel(cid uint32, dial func(context.Context, uint32, uint32) (Conn, error), listen func(uint32) (net.Listener, error)) *Kernel {
	k := &Kernel{cid: cid, dial: dial, listen: listen, open: make(map[interface{ Close() error }]struct{})}
	k.ctx, k.stop = context.WithCancel(context.Background())
	return k
}

// Dial implements Transport.
func (k *Kernel) Dial(ctx context.Context, port uint32) (Conn, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(k.ctx, cancel)()
	for {
		c, err := k.dial(ctx, k.cid, port)
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

// Listen implements Transport.
func (k *Kernel) Listen(port uint32) (net.Listener, error) {
	l, err := k.listen(port)
	switch {
	case errors.Is(err, syscall.EADDRINUSE):
		return nil, fmt.Errorf("listen on vsock port %d: a process of this host has it, with the kernel's vsock a port "+
			"serves one VM only (%w): %w", port, err, errdefs.ErrAlreadyExists)
	case err != nil:
		return nil, fmt.Errorf("listen on vsock port %d: %w", port, err)
	}
	kl := &kernelListener{Listener: l, k: k}
	if err := k.add(kl); err != nil {
		return nil, fmt.Errorf("listen on vsock port %d: %w", port, errors.Join(err, l.Close()))
	}
	return kl, nil
}

// Close implements Transport. The file that AllocateCID gave is the caller's.
func (k *Kernel) Close() error {
	k.stop()
	k.mu.Lock()
	open := k.open
	k.open, k.closed = nil, true
	k.mu.Unlock()
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
