// SPDX-License-Identifier: Apache-2.0

package network

import (
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// changeCNI is what to do about settings that only a CNI plugin can have made.
const changeCNI = "change the CNI configuration"

// mirrorable refuses what routes or answers packets in the namespace and would be missing in the guest: policy rules, routes in
// further tables, addresses of loopback. A pod without them would seem to work, and send its packets elsewhere.
func mirrorable(h *netlink.Handle) error {
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		rules, err := dump(func() ([]netlink.Rule, error) { return h.RuleList(family) })
		if err != nil && !errors.Is(err, unix.EOPNOTSUPP) { // a kernel without policy routing, or without IPv6
			return fmt.Errorf("list policy rules of network namespace: %w", err)
		}
		for _, r := range rules {
			if !standardRule(r) {
				return &UnsupportedError{"policy rule " + r.String(), "only the main routing table is carried over to a VM", changeCNI}
			}
		}
		routes, err := dump(func() ([]netlink.Route, error) {
			return h.RouteListFiltered(family, &netlink.Route{Table: unix.RT_TABLE_UNSPEC}, netlink.RT_FILTER_TABLE)
		})
		if err != nil {
			return fmt.Errorf("list routing tables of network namespace: %w", err)
		}
		for _, r := range routes {
			if r.Table != unix.RT_TABLE_MAIN && r.Table != unix.RT_TABLE_LOCAL {
				return &UnsupportedError{"route " + r.String(), "only the main routing table is carried over to a VM", changeCNI}
			}
		}
	}
	return loopback(h)
}

// standardRule reports whether a rule is one of those that each namespace begins with (fib_default_rules_init,
// fib6_rules_net_init in the kernel).
func standardRule(r netlink.Rule) bool {
	switch r.Table {
	case unix.RT_TABLE_LOCAL, unix.RT_TABLE_MAIN, unix.RT_TABLE_DEFAULT:
	default:
		return false
	}
	return r.Src == nil && r.Dst == nil && r.Mark == 0 && r.Tos == 0 && r.IifName == "" && r.OifName == "" && !r.Invert &&
		r.IPProto <= 0 && r.Sport == nil && r.Dport == nil && r.UIDRange == nil && r.TunID == 0 &&
		r.SuppressPrefixlen < 0 && r.SuppressIfgroup < 0
}

// loopback refuses addresses that loopback does not have by itself.
func loopback(h *netlink.Handle) error {
	links, err := dump(h.LinkList)
	if err != nil {
		return fmt.Errorf("list interfaces of network namespace: %w", err)
	}
	for _, l := range links {
		if l.Attrs().Flags&net.FlagLoopback == 0 {
			continue
		}
		addrs, err := dump(func() ([]netlink.Addr, error) { return h.AddrList(l, netlink.FAMILY_ALL) })
		if err != nil {
			return fmt.Errorf("list addresses of loopback: %w", err)
		}
		for _, a := range addrs {
			ip, ok := netip.AddrFromSlice(a.IP)
			if ok && ip.Unmap().IsLoopback() {
				continue
			}
			return &UnsupportedError{fmt.Sprintf("address %s of %s", a.IPNet, l.Attrs().Name),
				"a VM has loopback addresses of its own only", "put the address on another interface, a dummy for example"}
		}
	}
	return nil
}
