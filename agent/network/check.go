// SPDX-License-Identifier: Apache-2.0

package network

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/containerd/errdefs"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	agentv1 "github.com/cloister-project/cloister/agent-protocol/v1"
	"github.com/cloister-project/cloister/agent-protocol/wire"
)

// Limits of a pod's network.
const (
	maxInterfaces = 32
	maxAddresses  = 256 // of an interface
	maxRoutes     = 4096
	maxNeighbours = 4096
	maxMTU        = 65535
)

// validName is narrower than the kernel's rule: names end up as elements of sysctls' paths, where "all" and "default"
// have a meaning.
func validName(s string) bool {
	return len(s) < unix.IFNAMSIZ && wire.ValidID(s) && s != "all" && s != "default"
}

const loopback = "lo"

// plan is a checked request.
type plan struct {
	nics       []nic
	routes     []route
	neighbours []neighbour
}

type nic struct {
	mac       net.HardwareAddr
	name      string
	mtu       int // 0: as it is
	addresses []netip.Prefix
}

type route struct {
	device      string
	family      int
	destination netip.Prefix // 0.0.0.0/0 or ::/0 for the default
	gateway     netip.Addr   // may be invalid: none
	source      netip.Addr   // may be invalid: none
	scope       netlink.Scope
	metric, mtu int
	onlink      bool
}

type neighbour struct {
	device  string
	address netip.Addr
	mac     net.HardwareAddr
}

// newPlan checks a request; all faults are reported together, each errdefs.ErrInvalidArgument.
func newPlan(n *agentv1.Network) (*plan, error) {
	var p plan
	var faults []error
	bad := func(format string, args ...any) {
		faults = append(faults, fmt.Errorf(format+": %w", append(args, errdefs.ErrInvalidArgument)...))
	}
	if len(n.GetInterfaces()) > maxInterfaces || len(n.GetRoutes()) > maxRoutes || len(n.GetNeighbours()) > maxNeighbours {
		bad("%d interfaces, %d routes, %d neighbours; the limits are %d, %d, %d", len(n.GetInterfaces()), len(n.GetRoutes()),
			len(n.GetNeighbours()), maxInterfaces, maxRoutes, maxNeighbours)
		return nil, errors.Join(faults...)
	}
	devices := map[string]bool{loopback: true}
	for i, in := range n.GetInterfaces() {
		out := nic{name: in.GetName(), mtu: int(in.GetMtu())}
		var err error
		if out.mac, err = parseMAC(in.GetMac()); err != nil {
			bad("interface %d: %v", i+1, err)
		}
		for _, other := range p.nics {
			if bytes.Equal(other.mac, out.mac) {
				bad("interfaces %s and %s have the same hardware address %s", other.name, out.name, out.mac)
			}
		}
		if !validName(out.name) {
			bad("interface %d: name %.40q is not one of up to %d of [A-Za-z0-9_.-]", i+1, out.name, unix.IFNAMSIZ-1)
		} else if devices[out.name] {
			bad("interface name %s is taken", out.name)
		}
		devices[out.name] = true
		if in.GetMtu() > maxMTU {
			bad("interface %s: MTU %d is over %d", out.name, in.GetMtu(), maxMTU)
		}
		if len(in.GetAddresses()) > maxAddresses {
			bad("interface %s: %d addresses, the limit is %d", out.name, len(in.GetAddresses()), maxAddresses)
			continue
		}
		for _, a := range in.GetAddresses() {
			prefix, err := netip.ParsePrefix(a)
			if err != nil || prefix.Addr().Is4In6() {
				bad("interface %s: address %.60q is not ADDRESS/LENGTH", out.name, a)
				continue
			}
			out.addresses = append(out.addresses, prefix)
		}
		p.nics = append(p.nics, out)
	}
	for i, in := range n.GetRoutes() {
		out, err := parseRoute(in)
		if err == nil && !devices[out.device] {
			err = fmt.Errorf("no interface has the name %.40q", out.device)
		}
		if err != nil {
			bad("route %d: %v", i+1, err)
		}
		p.routes = append(p.routes, out)
	}
	for i, in := range n.GetNeighbours() {
		out := neighbour{device: in.GetDevice()}
		var err, macErr error
		out.address, err = netip.ParseAddr(in.GetAddress())
		out.mac, macErr = parseMAC(in.GetMac())
		if err = errors.Join(err, macErr); err != nil || !devices[out.device] || out.address.Zone() != "" {
			bad("neighbour %d: %.60q, %.40q at device %.40q: %v", i+1, in.GetAddress(), in.GetMac(), in.GetDevice(), err)
		}
		p.neighbours = append(p.neighbours, out)
	}
	return &p, errors.Join(faults...)
}

func parseMAC(s string) (net.HardwareAddr, error) {
	mac, err := net.ParseMAC(s)
	if err != nil || len(mac) != 6 || mac[0]&1 != 0 {
		return nil, fmt.Errorf("%.40q is not the hardware address of an Ethernet interface", s)
	}
	return mac, nil
}

func parseRoute(in *agentv1.Route) (out route, err error) {
	any4, any6 := netip.PrefixFrom(netip.IPv4Unspecified(), 0), netip.PrefixFrom(netip.IPv6Unspecified(), 0)
	out = route{device: in.GetDevice(), metric: int(in.GetMetric()), mtu: int(in.GetMtu()), onlink: in.GetOnlink()}
	var unspecified netip.Prefix
	switch in.GetFamily() {
	case 4:
		out.family, unspecified = unix.AF_INET, any4
	case 6:
		out.family, unspecified = unix.AF_INET6, any6
	default:
		return out, fmt.Errorf("family %d is neither 4 nor 6", in.GetFamily())
	}
	if in.GetScope() > unix.RT_SCOPE_NOWHERE {
		return out, fmt.Errorf("scope %d is over %d", in.GetScope(), unix.RT_SCOPE_NOWHERE)
	}
	out.scope = netlink.Scope(in.GetScope())
	if in.GetMtu() > maxMTU {
		return out, fmt.Errorf("MTU %d is over %d", in.GetMtu(), maxMTU)
	}
	if out.destination = unspecified; in.GetDestination() != "" {
		if out.destination, err = netip.ParsePrefix(in.GetDestination()); err != nil {
			return out, fmt.Errorf("destination: %w", err)
		}
		if out.destination != out.destination.Masked() {
			return out, fmt.Errorf("destination %s has bits beyond its length", out.destination)
		}
	}
	for _, a := range []struct {
		what, text string
		to         *netip.Addr
	}{{"gateway", in.GetGateway(), &out.gateway}, {"source", in.GetSource(), &out.source}} {
		if a.text == "" {
			continue
		}
		if *a.to, err = netip.ParseAddr(a.text); err != nil {
			return out, fmt.Errorf("%s: %w", a.what, err)
		}
		if a.to.Is4() != (in.GetFamily() == 4) || a.to.Zone() != "" {
			return out, fmt.Errorf("%s %s is not of family %d", a.what, a.to, in.GetFamily())
		}
	}
	if out.destination.Addr().Is4() != (in.GetFamily() == 4) {
		return out, fmt.Errorf("destination %s is not of family %d", out.destination, in.GetFamily())
	}
	return out, nil
}
