// SPDX-License-Identifier: Apache-2.0

package network

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// dump repeats a netlink dump that changes of the kernel's tables interrupted (netlink.ErrDumpInterrupted).
func dump[T any](list func() ([]T, error)) ([]T, error) {
	const tries = 8
	var items []T
	var err error
	for range tries {
		if items, err = list(); !errors.Is(err, netlink.ErrDumpInterrupted) {
			break
		}
	}
	return items, err
}

// candidates lists the interfaces that the guest gets, by index.
func candidates(ctx context.Context, h *netlink.Handle) ([]netlink.Link, error) {
	all, err := dump(h.LinkList)
	if err != nil {
		return nil, fmt.Errorf("list interfaces of network namespace: %w", err)
	}
	slices.SortFunc(all, func(a, b netlink.Link) int { return cmp.Compare(a.Attrs().Index, b.Attrs().Index) })
	var links []netlink.Link
	for _, l := range all {
		a := l.Attrs()
		if a.Flags&net.FlagLoopback != 0 {
			continue
		}
		if isTap(l) {
			return nil, joinedError(a.Name)
		}
		if a.Flags&net.FlagUp == 0 {
			addrs, err := dump(func() ([]netlink.Addr, error) { return h.AddrList(l, netlink.FAMILY_ALL) })
			if err != nil {
				return nil, fmt.Errorf("list addresses of interface %q: %w", a.Name, err)
			}
			// Such as tunl0 and sit0, which the kernel makes in each namespace once their modules are loaded.
			if len(addrs) == 0 {
				log.G(ctx).WithField("interface", a.Name).Debug("interface is down and has no addresses: not given to the guest")
				continue
			}
		}
		if err := supported(l); err != nil {
			return nil, err
		}
		links = append(links, l)
	}
	if len(links) > maxInterfaces {
		return nil, &UnsupportedError{fmt.Sprintf("a network namespace with %d interfaces", len(links)),
			fmt.Sprintf("a VM gets at most %d", maxInterfaces), "configure fewer CNI networks for the pod"}
	}
	return links, nil
}

// supported refuses interfaces whose frames cannot be mirrored.
func supported(l netlink.Link) error {
	a := l.Attrs()
	refuse := func(reason, fix string) error {
		return &UnsupportedError{fmt.Sprintf("interface %q of kind %s", a.Name, l.Type()), reason, fix}
	}
	switch l.Type() {
	case "ipvlan", "ipvtap":
		return refuse("all ipvlan interfaces share one MAC address and hand packets over by IP address, so frames of a guest do not pass",
			"use CNI's bridge, ptp or macvlan plugin")
	case "bridge", "openvswitch":
		return refuse("a switch inside the pod's namespace has no single peer to mirror",
			"use a CNI plugin that gives the pod an end point, such as bridge or ptp")
	case "tuntap", "macvtap":
		return refuse("its frames belong to whoever opens its device file", "remove CNI's tap plugin: Cloister makes the tap device itself")
	case "vrf":
		return refuse("its routing tables cannot be carried over to the guest", "remove the VRF from the pod's CNI configuration")
	case "netkit":
		return refuse("tc redirection into it is not tested", "use veth (Cilium: bpf.datapathMode=veth)")
	}
	if a.EncapType != "ether" || len(a.HardwareAddr) != 6 {
		return refuse("it carries "+a.EncapType+" packets, not Ethernet frames",
			"use a CNI plugin that makes Ethernet interfaces, such as bridge, ptp or macvlan")
	}
	if a.MasterIndex != 0 {
		return refuse("it is a port of another interface", "use a CNI plugin that gives the pod an end point, such as bridge or ptp")
	}
	return nil
}

// describe collects what the guest needs to know of one interface.
func describe(h *netlink.Handle, l netlink.Link) (Interface, error) {
	a := l.Attrs()
	i := Interface{HostName: a.Name, HostIndex: a.Index, GuestName: a.Name, MAC: slices.Clone(a.HardwareAddr), MTU: a.MTU}
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		addrs, err := dump(func() ([]netlink.Addr, error) { return h.AddrList(l, family) })
		if err != nil {
			return i, fmt.Errorf("list addresses of interface %q: %w", a.Name, err)
		}
		for _, addr := range addrs {
			// Without IFA_F_PERMANENT it came from a router advertisement; the guest's kernel gets its own.
			if family == netlink.FAMILY_V6 && (addr.IP.IsLinkLocalUnicast() || addr.Flags&unix.IFA_F_PERMANENT == 0) {
				continue
			}
			p, ok := prefix(addr.IPNet)
			if !ok {
				return i, fmt.Errorf("interface %q: address %v: %w", a.Name, addr.IPNet, errdefs.ErrInvalidArgument)
			}
			i.Addresses = append(i.Addresses, p)
		}
	}
	if len(i.Addresses) > maxAddresses {
		return i, &UnsupportedError{fmt.Sprintf("interface %q with %d addresses", a.Name, len(i.Addresses)),
			fmt.Sprintf("the limit is %d", maxAddresses), "configure fewer"}
	}
	return i, nil
}

// distinct makes sure that the guest can tell its interfaces apart.
func distinct(all []Interface) error {
	for k, i := range all {
		for _, j := range all[:k] {
			if bytes.Equal(i.MAC, j.MAC) {
				return &UnsupportedError{fmt.Sprintf("interfaces %q and %q with the same MAC address %s", j.HostName, i.HostName, i.MAC),
					"the guest finds its interfaces by MAC address", "give one of them another address in its CNI configuration"}
			}
		}
	}
	return nil
}

// routes collects the main tables of both families.
func routes(h *netlink.Handle, all []Interface) ([]Route, error) {
	names := map[int]string{}
	for _, i := range all {
		names[i.HostIndex] = i.GuestName
	}
	var out []Route
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		rs, err := dump(func() ([]netlink.Route, error) { return h.RouteList(nil, family) })
		if err != nil {
			return nil, fmt.Errorf("list routes of network namespace: %w", err)
		}
		for _, r := range rs {
			route, keep, err := convert(r, names)
			if err != nil {
				return nil, err
			}
			if keep {
				out = append(out, route)
			}
		}
	}
	if len(out) > maxRoutes {
		return nil, &UnsupportedError{fmt.Sprintf("a network namespace with %d routes", len(out)), fmt.Sprintf("the limit is %d", maxRoutes),
			"configure fewer"}
	}
	slices.SortStableFunc(out, func(a, b Route) int { return cmp.Compare(rank(a), rank(b)) })
	return out, nil
}

// rank orders routes so that each gateway is reachable by an earlier route, as far as there is one.
func rank(r Route) int {
	switch {
	case !r.Gateway.IsValid():
		return 0
	case r.Destination.Bits() > 0:
		return 1
	default:
		return 2
	}
}

// convert translates one route; keep is false for those that the guest's kernel makes by itself.
func convert(r netlink.Route, names map[int]string) (_ Route, keep bool, _ error) {
	if r.Protocol == unix.RTPROT_RA {
		return Route{}, false, nil
	}
	refuse := func(what, reason string) error {
		return &UnsupportedError{what + " route " + r.String(), reason, "change the CNI configuration"}
	}
	name, known := names[r.LinkIndex]
	switch {
	case r.Type != unix.RTN_UNICAST:
		if r.Protocol == unix.RTPROT_KERNEL || r.Type == unix.RTN_MULTICAST || r.Type == unix.RTN_LOCAL || r.Type == unix.RTN_BROADCAST ||
			r.Type == unix.RTN_ANYCAST {
			return Route{}, false, nil
		}
		return Route{}, false, refuse("blackhole, unreachable or other special", "only unicast routes are carried over")
	case len(r.MultiPath) > 0:
		return Route{}, false, refuse("multipath", "only routes with one next hop are carried over")
	case r.Encap != nil || r.MPLSDst != nil:
		return Route{}, false, refuse("encapsulating", "only plain IP routes are carried over")
	case !known:
		// Of loopback, or of an interface that is down.
		return Route{}, false, nil
	}
	out := Route{Interface: name, Metric: uint32(r.Priority), Scope: uint8(r.Scope), OnLink: r.Flags&unix.RTNH_F_ONLINK != 0, MTU: r.MTU}
	switch {
	case r.Dst != nil:
		p, ok := prefix(r.Dst)
		if !ok {
			return Route{}, false, fmt.Errorf("route %v: destination: %w", r, errdefs.ErrInvalidArgument)
		}
		out.Destination = p
	case r.Family == netlink.FAMILY_V6:
		out.Destination = netip.PrefixFrom(netip.IPv6Unspecified(), 0)
	default:
		out.Destination = netip.PrefixFrom(netip.IPv4Unspecified(), 0)
	}
	if d := out.Destination.Addr(); d.Is6() && r.Protocol == unix.RTPROT_KERNEL && (d.IsLinkLocalUnicast() || d.IsMulticast()) {
		return Route{}, false, nil
	}
	gw := r.Gw
	if via, ok := r.Via.(*netlink.Via); ok {
		gw = via.Addr
	}
	if gw != nil {
		if out.Gateway, known = netip.AddrFromSlice(gw); !known {
			return Route{}, false, fmt.Errorf("route %v: gateway: %w", r, errdefs.ErrInvalidArgument)
		}
	}
	if r.Src != nil {
		if out.Source, known = netip.AddrFromSlice(r.Src); !known {
			return Route{}, false, fmt.Errorf("route %v: source: %w", r, errdefs.ErrInvalidArgument)
		}
	}
	out.Gateway, out.Source = out.Gateway.Unmap(), out.Source.Unmap()
	return out, true, nil
}

// neighbours collects permanent entries only: all others the guest learns, and must, since they age.
func neighbours(h *netlink.Handle, all []Interface) ([]Neighbour, error) {
	var out []Neighbour
	for _, i := range all {
		for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
			ns, err := dump(func() ([]netlink.Neigh, error) { return h.NeighList(i.HostIndex, family) })
			if err != nil {
				return nil, fmt.Errorf("list neighbours of interface %q: %w", i.HostName, err)
			}
			for _, n := range ns {
				addr, ok := netip.AddrFromSlice(n.IP)
				if n.State&unix.NUD_PERMANENT == 0 || n.Flags&unix.NTF_PROXY != 0 || !ok || len(n.HardwareAddr) != 6 {
					continue
				}
				out = append(out, Neighbour{Interface: i.GuestName, Address: addr.Unmap(), MAC: slices.Clone(n.HardwareAddr)})
			}
		}
	}
	if len(out) > maxNeighbours {
		return nil, &UnsupportedError{fmt.Sprintf("a network namespace with %d permanent neighbours", len(out)),
			fmt.Sprintf("the limit is %d", maxNeighbours), "configure fewer"}
	}
	return out, nil
}

func prefix(n *net.IPNet) (netip.Prefix, bool) {
	if n == nil {
		return netip.Prefix{}, false
	}
	ones, bits := n.Mask.Size()
	addr, ok := netip.AddrFromSlice(n.IP)
	if addr = addr.Unmap(); !ok || bits != addr.BitLen() {
		return netip.Prefix{}, false
	}
	return netip.PrefixFrom(addr, ones), true
}
