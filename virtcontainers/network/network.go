// SPDX-License-Identifier: Apache-2.0

package network

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Limits of what a namespace may hold: each interface is a device of the VM, and all of it goes to the guest in one
// message.
const (
	maxInterfaces = 16
	maxAddresses  = 256  // of one interface
	maxRoutes     = 2048 // in all
	maxNeighbours = 2048 // in all
)

// Interface is one of CNI's interfaces and the tap device that carries its frames to the guest.
type Interface struct {
	// HostName and HostIndex are the interface's in the namespace.
	HostName  string
	HostIndex int
	// TapName is the tap device's name in the namespace.
	TapName string
	// Tap is the tap device's fd, one queue, with IFF_VNET_HDR. It belongs to the Network; a VMM gets a duplicate.
	Tap *os.File
	// GuestName is what the interface is to be called in the guest: what CNI called it.
	GuestName string
	// MAC is the interface's own address, and the guest's. No two interfaces have the same: the guest finds its
	// interfaces by it.
	MAC net.HardwareAddr
	// MTU in bytes.
	MTU int
	// Addresses with the lengths of their prefixes, IPv4 before IPv6. Link-local IPv6 addresses are left to the guest.
	Addresses []netip.Prefix
}

// Route is a route of the main table.
type Route struct {
	// Interface is a GuestName.
	Interface string
	// Destination; the default route is 0.0.0.0/0 or ::/0.
	Destination netip.Prefix
	// Gateway is invalid (the zero value) for a route without one. An IPv4 route may have an IPv6 gateway.
	Gateway netip.Addr
	// Source is the preferred source address; invalid where there is none.
	Source netip.Addr
	// Metric is the priority; 0 is the kernel's default (0 for IPv4, 1024 for IPv6).
	Metric uint32
	// Scope is the kernel's RT_SCOPE_*: 0 universe, 253 link, 254 host.
	Scope uint8
	// OnLink says that the gateway is reachable although no route covers it.
	OnLink bool
	// MTU in bytes; 0 is the interface's.
	MTU int
}

// Neighbour is a permanent ARP or NDP entry.
type Neighbour struct {
	// Interface is a GuestName.
	Interface string
	Address   netip.Addr
	MAC       net.HardwareAddr
}

// Network is a namespace that is connected to tap devices. The exported fields are immutable.
type Network struct {
	Interfaces []Interface
	// Routes without a gateway come first, so that adding them in order works.
	Routes     []Route
	Neighbours []Neighbour

	sandbox string

	mu sync.Mutex
	ns *os.File // own duplicate; nil when closed
}

// Attach connects the interfaces of the namespace to new tap devices and collects what the guest needs to take their
// place. ns stays the caller's. What it makes is marked as the sandbox's. A namespace with nothing but loopback gives a
// Network without interfaces.
//
// What a VM cannot have gives an *UnsupportedError: the host's namespace, interfaces that carry no Ethernet frames or
// belong to a bridge, multipath routes, policy rules, further tables. A namespace that another VM is attached to is an
// errdefs.ErrAlreadyExists, an interface with tc ingress filters of somebody else an errdefs.ErrFailedPrecondition. If Attach
// fails, nothing of it is left, and nothing of others has changed.
func Attach(ctx context.Context, ns *os.File, sandbox string) (*Network, error) {
	return attach(ctx, ns, sandbox, false)
}

// attach is Attach; forceU32 leaves matchall out, for tests.
func attach(ctx context.Context, ns *os.File, sandbox string, forceU32 bool) (_ *Network, retErr error) {
	host, err := isHost(ns)
	if err != nil {
		return nil, err
	}
	if host {
		return nil, HostNetworkError()
	}
	fd, err := unix.FcntlInt(ns.Fd(), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return nil, fmt.Errorf("duplicate network namespace: %w", err)
	}
	n := &Network{ns: os.NewFile(uintptr(fd), ns.Name()), sandbox: sandbox}
	defer func() {
		if retErr != nil {
			if err := n.Close(); err != nil {
				log.G(ctx).WithError(err).Warn("undo the set-up of the pod's network")
			}
		}
	}()
	h, err := handle(n.ns)
	if err != nil {
		return nil, err
	}
	defer h.Close()

	links, err := candidates(ctx, h)
	if err != nil {
		return nil, err
	}
	if err := mirrorable(h); err != nil {
		return nil, err
	}
	// Everything is read before anything is changed: a refusal costs nothing then.
	for _, l := range links {
		i, err := describe(h, l)
		if err != nil {
			return nil, err
		}
		n.Interfaces = append(n.Interfaces, i)
	}
	if err := distinct(n.Interfaces); err != nil {
		return nil, err
	}
	if n.Routes, err = routes(h, n.Interfaces); err != nil {
		return nil, err
	}
	if n.Neighbours, err = neighbours(h, n.Interfaces); err != nil {
		return nil, err
	}
	for _, l := range links {
		if err := claim(h, l); err != nil {
			return nil, err
		}
	}
	for k := range n.Interfaces {
		if err := ctx.Err(); err != nil {
			return nil, fmt.Errorf("set up the pod's network: %w", err)
		}
		i := &n.Interfaces[k]
		i.TapName = fmt.Sprintf("%s%x", tapNames(sandbox), k)
		if i.Tap, err = newTap(ctx, n.ns, i.TapName); err != nil {
			return nil, fmt.Errorf("tap device for interface %q: %w", i.HostName, err)
		}
		tap, err := h.LinkByName(i.TapName)
		if err != nil {
			return nil, fmt.Errorf("find tap device %q: %w", i.TapName, err)
		}
		if err := h.LinkSetMTU(tap, i.MTU); err != nil {
			return nil, fmt.Errorf("set MTU %d of tap device for interface %q: %w", i.MTU, i.HostName, err)
		}
		if err := h.LinkSetUp(tap); err != nil {
			return nil, fmt.Errorf("set tap device for interface %q up: %w", i.HostName, err)
		}
		// The guest's way out first: what arrives meanwhile is still the stack's, not lost.
		if err := redirect(h, tap, links[k], forceU32); err != nil {
			return nil, err
		}
		if err := redirect(h, links[k], tap, forceU32); err != nil {
			return nil, err
		}
		log.G(ctx).WithFields(log.Fields{"interface": i.HostName, "tap": i.TapName, "mac": i.MAC.String(), "mtu": i.MTU}).
			Debug("interface mirrored to tap device")
	}
	return n, nil
}

// Close gives the interfaces back to the namespace's own stack, removes the tap devices and lets go of the namespace.
// The VMM should have ended: its devices lose their carrier. Close may be repeated; only the first call does anything.
func (n *Network) Close() error {
	n.mu.Lock()
	ns := n.ns
	n.ns = nil
	n.mu.Unlock()
	if ns == nil {
		return nil
	}
	err := sweep(ns, n.sandbox)
	for _, i := range n.Interfaces {
		if i.Tap != nil {
			err = errors.Join(err, i.Tap.Close())
		}
	}
	return errors.Join(err, ns.Close())
}

// Cleanup removes what a sandbox's killed shim left in the namespace at path: qdiscs on CNI's interfaces, and tap devices
// that a living VMM still holds. What another sandbox has there stays. No path, a namespace that does not exist any more,
// and the host's own namespace (where nothing was made) are no errors. It may be repeated.
func Cleanup(path, sandbox string) error {
	if path == "" {
		return nil
	}
	ns, err := Open(path)
	var unsupported *UnsupportedError
	if errdefs.IsNotFound(err) || errors.Is(err, errNotNetns) || errors.As(err, &unsupported) {
		return nil
	}
	if err != nil {
		return err
	}
	defer ns.Close()
	return sweep(ns, sandbox)
}

// sweep removes all that Attach makes for a sandbox in a namespace: its tap devices, by their names, and every qdisc of ours
// that redirects to no device that is still there.
func sweep(ns *os.File, sandbox string) error {
	h, err := handle(ns)
	if err != nil {
		return err
	}
	defer h.Close()
	links, err := dump(h.LinkList)
	if err != nil {
		return fmt.Errorf("list interfaces of network namespace: %w", err)
	}
	var errs []error
	for _, l := range links {
		if !isTapOf(l, sandbox) {
			continue
		}
		// Its qdisc goes with it.
		if err := h.LinkDel(l); err != nil && !isGone(err) {
			errs = append(errs, fmt.Errorf("remove tap device %q: %w", l.Attrs().Name, err))
		}
	}
	for _, l := range links {
		if isTap(l) {
			continue
		}
		if err := release(h, l); err != nil {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// isGone tells the errors of an interface or qdisc that does not exist any more.
func isGone(err error) bool {
	var notFound netlink.LinkNotFoundError
	return errors.As(err, &notFound) || errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENXIO)
}
