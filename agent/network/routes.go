// SPDX-License-Identifier: Apache-2.0

package network

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// toNetlink turns a route into the library's. A default route has a destination too: the library takes none for it
// only with a gateway.
func (r route) toNetlink(index map[string]int) *netlink.Route {
	out := &netlink.Route{
		Family: r.family, LinkIndex: index[r.device], Dst: ipNet(r.destination), Scope: r.scope, Priority: r.metric, MTU: r.mtu,
		Protocol: unix.RTPROT_STATIC, Table: unix.RT_TABLE_MAIN, Type: unix.RTN_UNICAST,
	}
	if r.gateway.IsValid() {
		out.Gw = r.gateway.AsSlice()
	}
	if r.source.IsValid() {
		out.Src = r.source.AsSlice()
	}
	if r.onlink {
		out.Flags |= int(netlink.FLAG_ONLINK)
	}
	return out
}

// routeKey is what makes two routes the same to the kernel: the one is replaced by the other.
type routeKey struct {
	family      int
	destination netip.Prefix
	metric      int
}

func (r route) key() routeKey {
	metric := r.metric
	if metric == 0 && r.family == unix.AF_INET6 {
		metric = 1024 // IP6_RT_PRIO_USER
	}
	return routeKey{r.family, r.destination, metric}
}

// setRoutes removes routes that are not asked for, then sets the others. Those without a gateway come first: gateways
// are reached through them.
func setRoutes(h *netlink.Handle, routes []route, index map[string]int) error {
	wanted := map[routeKey]bool{}
	for _, r := range routes {
		wanted[r.key()] = true
	}
	ours := slices.Collect(maps.Values(index))
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		have, err := h.RouteListFiltered(family, &netlink.Route{Table: unix.RT_TABLE_MAIN}, netlink.RT_FILTER_TABLE)
		if err != nil {
			return fmt.Errorf("list routes: %w", err)
		}
		for _, r := range have {
			key := routeKey{family: family, metric: r.Priority}
			key.destination, _ = prefixOf(r.Dst)
			kernels := r.Protocol == unix.RTPROT_KERNEL || r.Protocol == unix.RTPROT_RA
			if kernels || wanted[key] || !slices.Contains(ours, r.LinkIndex) {
				continue
			}
			if err := h.RouteDel(&r); err != nil && !errors.Is(err, unix.ESRCH) {
				return fmt.Errorf("remove route %s: %w", r, err)
			}
		}
	}
	ordered := slices.Clone(routes)
	slices.SortStableFunc(ordered, func(a, b route) int { return cmp.Compare(gatewayRank(a), gatewayRank(b)) })
	for _, r := range ordered {
		if err := h.RouteReplace(r.toNetlink(index)); err != nil {
			return fmt.Errorf("set the route to %s by gateway %q at %s: %w", r.destination, gatewayText(r), r.device, err)
		}
	}
	return nil
}

func gatewayRank(r route) int {
	if r.gateway.IsValid() {
		return 1
	}
	return 0
}

func gatewayText(r route) string {
	if r.gateway.IsValid() {
		return r.gateway.String()
	}
	return ""
}

// setNeighbours does for permanent neighbours what setRoutes does for routes.
func setNeighbours(h *netlink.Handle, neighbours []neighbour, index map[string]int) error {
	type key struct {
		link    int
		address netip.Addr
	}
	wanted := map[key]neighbour{}
	for _, n := range neighbours {
		wanted[key{index[n.device], n.address}] = n
	}
	for _, link := range index {
		have, err := h.NeighList(link, netlink.FAMILY_ALL)
		if err != nil {
			return fmt.Errorf("list neighbours: %w", err)
		}
		for _, n := range have {
			address, _ := netip.AddrFromSlice(n.IP)
			w, ok := wanted[key{link, address.Unmap()}]
			if n.State&unix.NUD_PERMANENT == 0 || ok && bytes.Equal(w.mac, n.HardwareAddr) {
				continue
			}
			if err := h.NeighDel(&n); err != nil && !errors.Is(err, unix.ENOENT) {
				return fmt.Errorf("remove neighbour %s: %w", n.IP, err)
			}
		}
	}
	for k, n := range wanted {
		family := unix.AF_INET6
		if n.address.Is4() {
			family = unix.AF_INET
		}
		err := h.NeighSet(&netlink.Neigh{
			LinkIndex: k.link, Family: family, State: unix.NUD_PERMANENT, Type: unix.RTN_UNICAST,
			IP: n.address.AsSlice(), HardwareAddr: n.mac,
		})
		if err != nil {
			return fmt.Errorf("set neighbour %s (%s) at %s: %w", n.address, n.mac, n.device, err)
		}
	}
	return nil
}
