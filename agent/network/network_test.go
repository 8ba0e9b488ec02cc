// SPDX-License-Identifier: Apache-2.0

package network

import (
	"context"
	"os"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	agentv1 "github.com/cloister-project/cloister/agent-protocol/v1"
)

const (
	mac0 = "02:00:00:00:00:10"
	mac1 = "02:00:00:00:00:11"
)

// inNetNS puts the test into a network namespace of its own. Its thread ends with the test.
func inNetNS(t *testing.T) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root to make a network namespace")
	}
	runtime.LockOSThread()
	require.NoError(t, unix.Unshare(unix.CLONE_NEWNET))
}

func addNIC(t *testing.T, name, mac string) {
	t.Helper()
	hw, err := parseMAC(mac)
	require.NoError(t, err)
	require.NoError(t, netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: name, HardwareAddr: hw}, PeerName: name + "p"}))
	peer, err := netlink.LinkByName(name + "p")
	require.NoError(t, err)
	require.NoError(t, netlink.LinkSetUp(peer))
}

func podNetwork() *agentv1.Network {
	return &agentv1.Network{
		Interfaces: []*agentv1.Interface{{Mac: mac0, Name: "eth0", Mtu: 1400, Addresses: []string{"10.1.2.3/24", "fd00::3/64"}}},
		Routes: []*agentv1.Route{
			{Family: 4, Gateway: "169.254.1.1", Device: "eth0"},
			{Family: 4, Destination: "169.254.1.1/32", Device: "eth0", Scope: unix.RT_SCOPE_LINK},
			{Family: 4, Destination: "10.9.0.0/16", Gateway: "10.1.2.1", Device: "eth0", Source: "10.1.2.3", Metric: 7, Mtu: 1300},
			{Family: 6, Gateway: "fd00::1", Device: "eth0"},
		},
		Neighbours: []*agentv1.Neighbour{{Address: "169.254.1.1", Mac: "ee:ee:ee:ee:ee:ee", Device: "eth0"}},
	}
}

func routes(t *testing.T, family int) (out []string) {
	list, err := netlink.RouteListFiltered(family, &netlink.Route{Table: unix.RT_TABLE_MAIN}, netlink.RT_FILTER_TABLE)
	require.NoError(t, err)
	for _, r := range list {
		if r.Protocol != unix.RTPROT_KERNEL {
			out = append(out, strings.TrimSpace(r.Dst.String()+" "+r.Gw.String()))
		}
	}
	return out
}

func addresses(t *testing.T, name string) (out []string) {
	l, err := netlink.LinkByName(name)
	require.NoError(t, err)
	list, err := netlink.AddrList(l, netlink.FAMILY_ALL)
	require.NoError(t, err)
	for _, a := range list {
		if a.Scope == unix.RT_SCOPE_UNIVERSE {
			out = append(out, a.IPNet.String())
			require.Zero(t, a.Flags&unix.IFA_F_TENTATIVE, a)
		}
	}
	return out
}

func TestApply(t *testing.T) {
	inNetNS(t)
	addNIC(t, "nic7", mac0)
	ctx := t.Context()
	for range 2 { // the second time changes nothing
		require.NoError(t, Apply(ctx, podNetwork()))
		l, err := netlink.LinkByName("eth0")
		require.NoError(t, err)
		require.Equal(t, 1400, l.Attrs().MTU)
		require.ElementsMatch(t, []string{"10.1.2.3/24", "fd00::3/64"}, addresses(t, "eth0"))
		require.ElementsMatch(t, []string{"0.0.0.0/0 169.254.1.1", "169.254.1.1/32 <nil>", "10.9.0.0/16 10.1.2.1"}, routes(t, unix.AF_INET))
		require.Contains(t, routes(t, unix.AF_INET6), "::/0 fd00::1")
		neighbours, err := netlink.NeighList(l.Attrs().Index, unix.AF_INET)
		require.NoError(t, err)
		require.Len(t, neighbours, 1)
		lo, err := netlink.LinkByName("lo")
		require.NoError(t, err)
		require.NotZero(t, lo.Attrs().RawFlags&unix.IFF_UP)
	}

	// Applying something else replaces all of it.
	other := &agentv1.Network{
		Interfaces: []*agentv1.Interface{{Mac: mac0, Name: "net1", Addresses: []string{"10.1.2.4/24"}}},
		Routes:     []*agentv1.Route{{Family: 4, Gateway: "10.1.2.1", Device: "net1"}},
	}
	require.NoError(t, Apply(ctx, other))
	require.Equal(t, []string{"10.1.2.4/24"}, addresses(t, "net1"))
	require.Equal(t, []string{"0.0.0.0/0 10.1.2.1"}, routes(t, unix.AF_INET))
	require.Empty(t, routes(t, unix.AF_INET6))
	l, err := netlink.LinkByName("net1")
	require.NoError(t, err)
	neighbours, err := netlink.NeighList(l.Attrs().Index, unix.AF_INET)
	require.NoError(t, err)
	for _, n := range neighbours {
		require.Zero(t, n.State&unix.NUD_PERMANENT, n)
	}
}

func TestNamesChangePlaces(t *testing.T) {
	inNetNS(t)
	addNIC(t, "eth0", mac0)
	addNIC(t, "eth1", mac1)
	require.NoError(t, Apply(t.Context(), &agentv1.Network{Interfaces: []*agentv1.Interface{
		{Mac: mac0, Name: "eth1", Addresses: []string{"10.0.0.1/32"}}, {Mac: mac1, Name: "eth0", Addresses: []string{"10.0.0.2/32"}},
	}}))
	require.Equal(t, []string{"10.0.0.1/32"}, addresses(t, "eth1"))
	require.Equal(t, []string{"10.0.0.2/32"}, addresses(t, "eth0"))
}

func TestWaitsForNIC(t *testing.T) {
	inNetNS(t)
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	err := Apply(ctx, podNetwork())
	require.ErrorIs(t, err, context.DeadlineExceeded)
	require.ErrorContains(t, err, mac0)

	ns, err := os.Open("/proc/thread-self/ns/net")
	require.NoError(t, err)
	defer ns.Close()
	added := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends
		err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET)
		if err == nil {
			hw, _ := parseMAC(mac0)
			err = netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "late", HardwareAddr: hw}, PeerName: "latep"})
		}
		added <- err
	}()
	require.NoError(t, Apply(t.Context(), &agentv1.Network{Interfaces: podNetwork().Interfaces}))
	require.NoError(t, <-added)
}

func TestRefusals(t *testing.T) {
	good := podNetwork()
	_, err := newPlan(good)
	require.NoError(t, err)
	for name, change := range map[string]func(*agentv1.Network){
		"mac":             func(n *agentv1.Network) { n.Interfaces[0].Mac = "x" },
		"multicast mac":   func(n *agentv1.Network) { n.Interfaces[0].Mac = "01:00:00:00:00:01" },
		"long mac":        func(n *agentv1.Network) { n.Interfaces[0].Mac = "02:00:00:00:00:00:00:01" },
		"name with slash": func(n *agentv1.Network) { n.Interfaces[0].Name = "../all" },
		"name lo":         func(n *agentv1.Network) { n.Interfaces[0].Name = "lo" },
		"name all":        func(n *agentv1.Network) { n.Interfaces[0].Name = "all" },
		"long name":       func(n *agentv1.Network) { n.Interfaces[0].Name = strings.Repeat("e", 16) },
		"mtu":             func(n *agentv1.Network) { n.Interfaces[0].Mtu = 1 << 20 },
		"address":         func(n *agentv1.Network) { n.Interfaces[0].Addresses[0] = "10.1.2.3" },
		"mapped address":  func(n *agentv1.Network) { n.Interfaces[0].Addresses[0] = "::ffff:10.1.2.3/120" },
		"same mac": func(n *agentv1.Network) {
			n.Interfaces = append(n.Interfaces, &agentv1.Interface{Mac: mac0, Name: "b"})
		},
		"same name": func(n *agentv1.Network) {
			n.Interfaces = append(n.Interfaces, &agentv1.Interface{Mac: mac1, Name: "eth0"})
		},
		"too many":          func(n *agentv1.Network) { n.Interfaces = make([]*agentv1.Interface, maxInterfaces+1) },
		"family":            func(n *agentv1.Network) { n.Routes[0].Family = 5 },
		"gateway's family":  func(n *agentv1.Network) { n.Routes[0].Gateway = "fe80::1" },
		"gateway":           func(n *agentv1.Network) { n.Routes[0].Gateway = "gw" },
		"zone":              func(n *agentv1.Network) { n.Routes[3].Gateway = "fe80::1%eth0" },
		"destination":       func(n *agentv1.Network) { n.Routes[1].Destination = "10.0.0.1/8" },
		"dest family":       func(n *agentv1.Network) { n.Routes[1].Destination = "fd00::/64" },
		"scope":             func(n *agentv1.Network) { n.Routes[1].Scope = 256 },
		"unknown device":    func(n *agentv1.Network) { n.Routes[1].Device = "eth1" },
		"neighbour":         func(n *agentv1.Network) { n.Neighbours[0].Address = "" },
		"neighbour's mac":   func(n *agentv1.Network) { n.Neighbours[0].Mac = "" },
		"neighbour nowhere": func(n *agentv1.Network) { n.Neighbours[0].Device = "" },
	} {
		n := podNetwork()
		change(n)
		_, err := newPlan(n)
		require.ErrorIs(t, err, errdefs.ErrInvalidArgument, name)
	}
}

func TestAllFaultsAreTold(t *testing.T) {
	n := podNetwork()
	n.Interfaces[0].Mtu = 1 << 20
	n.Routes[0].Family = 0
	_, err := newPlan(n)
	require.ErrorContains(t, err, "MTU")
	require.ErrorContains(t, err, "family")
}

func FuzzPlan(f *testing.F) {
	f.Add(mac0, "eth0", "10.0.0.1/8", "10.0.0.0/8", "10.0.0.1", uint32(4))
	f.Add("", "..", "::1/200", "fe80::%1/3", "::ffff:1.2.3.4", uint32(6))
	f.Fuzz(func(t *testing.T, mac, name, address, destination, gateway string, family uint32) {
		p, err := newPlan(&agentv1.Network{
			Interfaces: []*agentv1.Interface{{Mac: mac, Name: name, Addresses: []string{address}}},
			Routes:     []*agentv1.Route{{Device: name, Destination: destination, Gateway: gateway, Source: gateway, Family: family}},
			Neighbours: []*agentv1.Neighbour{{Device: name, Mac: mac, Address: gateway}},
		})
		if err == nil {
			_ = p.routes[0].toNetlink(map[string]int{name: 1})
			require.NotContains(t, name, "/")
		}
	})
}
