// SPDX-License-Identifier: Apache-2.0

package network

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

func TestAttachCarriesFrames(t *testing.T) {
	for _, tc := range []struct {
		name     string
		forceU32 bool
		add      func(*testing.T, *netlink.Handle, *Namespace, *netlink.Handle) netlink.Link
	}{
		{"veth", false, func(t *testing.T, host *netlink.Handle, podNs *Namespace, pod *netlink.Handle) netlink.Link {
			return addVeth(t, host, podNs, pod, "peer0", "eth0", podMAC)
		}},
		{"veth with u32", true, func(t *testing.T, host *netlink.Handle, podNs *Namespace, pod *netlink.Handle) netlink.Link {
			return addVeth(t, host, podNs, pod, "peer0", "eth0", podMAC)
		}},
		{"macvlan", false, addMacvlan},
	} {
		t.Run(tc.name, func(t *testing.T) {
			needRoot(t)
			hostNs, host := newNs(t)
			podNs, pod := newNs(t)
			eth0 := tc.add(t, host, podNs, pod)
			addAddr(t, pod, eth0, "10.1.0.2/24", 0)

			n, err := attach(context.Background(), podNs.File(), "sandbox", tc.forceU32)
			require.NoError(t, err)
			defer n.Close()
			require.Len(t, n.Interfaces, 1)
			tap := n.Interfaces[0].Tap
			peer := packetSocket(t, hostNs, "peer0")

			for _, payload := range []string{"ping", "", "x", string(bytes.Repeat([]byte("y"), 1400))} {
				in := frame(podMAC, peerMAC, payload)
				_, err = peer.Write(in)
				require.NoError(t, err)
				got := expect(t, tap, vnetHdrLen)
				assert.True(t, bytes.HasPrefix(got, in), "%d bytes in, got %d", len(in), len(got))

				out := frame(peerMAC, podMAC, payload)
				_, err = tap.Write(append(make([]byte, vnetHdrLen), out...))
				require.NoError(t, err)
				for {
					// The packet socket sees what it sent itself, too.
					if got = expect(t, peer, 0); bytes.Equal(got[6:12], podMAC) {
						break
					}
				}
				assert.True(t, bytes.HasPrefix(got, out))
			}

			// The namespace's stack has the address, but only the guest may answer for it.
			_, err = peer.Write(arpRequest(netip.MustParseAddr("10.1.0.2")))
			require.NoError(t, err)
			got := expect(t, tap, vnetHdrLen)
			assert.Equal(t, []byte{0x08, 0x06}, got[12:14])
			_, err = tap.Write(append(make([]byte, vnetHdrLen), frame(peerMAC, podMAC, "end")...))
			require.NoError(t, err)
			for {
				got = expect(t, peer, 0)
				if bytes.Equal(got[6:12], peerMAC) {
					continue
				}
				require.NotEqual(t, []byte{0x08, 0x06}, got[12:14], "the host's stack answered ARP")
				break
			}

			link, err := pod.LinkByName(n.Interfaces[0].TapName)
			require.NoError(t, err)
			assert.Equal(t, 1400, link.Attrs().MTU)

			// After Close the namespace's own stack is back.
			require.NoError(t, n.Close())
			require.NoError(t, n.Close())
			_, err = pod.LinkByName(n.Interfaces[0].TapName)
			assert.ErrorAs(t, err, &netlink.LinkNotFoundError{})
			_, err = peer.Write(arpRequest(netip.MustParseAddr("10.1.0.2")))
			require.NoError(t, err)
			for {
				if got = expect(t, peer, 0); bytes.Equal(got[6:12], podMAC) {
					break
				}
			}
			assert.Equal(t, []byte{0, 2}, got[20:22], "an ARP reply")
			assertClean(t, pod, "eth0")
		})
	}
}

// assertClean checks that a namespace has lo and the given interfaces, and none of our qdiscs.
func assertClean(t *testing.T, h *netlink.Handle, want ...string) {
	t.Helper()
	links, err := h.LinkList()
	require.NoError(t, err)
	var names []string
	for _, l := range links {
		if l.Attrs().Flags&net.FlagLoopback != 0 || l.Attrs().Flags&net.FlagUp == 0 {
			continue
		}
		names = append(names, l.Attrs().Name)
		state, err := ingressOf(h, l)
		require.NoError(t, err)
		assert.Equal(t, ingressFree, state, l.Attrs().Name)
	}
	assert.ElementsMatch(t, want, names)
}

func TestCollect(t *testing.T) {
	needRoot(t)
	_, host := newNs(t)
	podNs, pod := newNs(t)
	eth0 := addVeth(t, host, podNs, pod, "peer0", "eth0", podMAC)
	net1 := addVeth(t, host, podNs, pod, "peer1", "net1", net.HardwareAddr{0x02, 0, 0, 0, 0, 0x03})
	addAddr(t, pod, eth0, "10.1.0.2/24", 0)
	addAddr(t, pod, eth0, "10.9.0.2/32", 0)
	addAddr(t, pod, eth0, "fd00:1::2/64", unix.IFA_F_NODAD)
	addAddr(t, pod, net1, "10.2.0.2/16", unix.IFA_F_NOPREFIXROUTE)
	add := func(r netlink.Route) {
		t.Helper()
		require.NoError(t, pod.RouteAdd(&r))
	}
	i0, i1 := eth0.Attrs().Index, net1.Attrs().Index
	add(netlink.Route{LinkIndex: i0, Dst: cidr(t, "169.254.1.1/32"), Scope: netlink.SCOPE_LINK})
	add(netlink.Route{LinkIndex: i0, Dst: cidr(t, "10.50.0.0/16"), Gw: net.ParseIP("10.1.0.9"), Priority: 77, Src: net.ParseIP("10.1.0.2"),
		MTU: 1300})
	add(netlink.Route{LinkIndex: i0, Gw: net.ParseIP("169.254.1.1")})
	add(netlink.Route{LinkIndex: i1, Dst: cidr(t, "10.60.0.0/16"), Gw: net.ParseIP("192.168.7.1"), Flags: int(netlink.FLAG_ONLINK)})
	add(netlink.Route{LinkIndex: i0, Dst: cidr(t, "::/0"), Gw: net.ParseIP("fd00:1::1")})
	add(netlink.Route{LinkIndex: i0, Dst: cidr(t, "10.70.0.0/16"),
		Via: &netlink.Via{AddrFamily: unix.AF_INET6, Addr: net.ParseIP("fd00:1::1")}})
	for _, n := range []netlink.Neigh{
		{LinkIndex: i0, State: unix.NUD_PERMANENT, IP: net.ParseIP("169.254.1.1"), HardwareAddr: peerMAC},
		{LinkIndex: i0, State: unix.NUD_PERMANENT, IP: net.ParseIP("fd00:1::1"), HardwareAddr: peerMAC},
		{LinkIndex: i0, State: unix.NUD_REACHABLE, IP: net.ParseIP("10.1.0.77"), HardwareAddr: peerMAC},
	} {
		require.NoError(t, pod.NeighAdd(&n))
	}
	// An interface that is down and has no addresses is not CNI's.
	require.NoError(t, pod.LinkAdd(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "idle"}}))

	n, err := Attach(context.Background(), podNs.File(), "sandbox")
	require.NoError(t, err)
	defer n.Close()

	require.Len(t, n.Interfaces, 2)
	a, b := n.Interfaces[0], n.Interfaces[1]
	assert.Equal(t, "eth0", a.HostName)
	assert.Equal(t, "eth0", a.GuestName)
	assert.Equal(t, i0, a.HostIndex)
	assert.Equal(t, podMAC, a.MAC)
	assert.Equal(t, 1400, a.MTU)
	assert.Equal(t, []netip.Prefix{netip.MustParsePrefix("10.1.0.2/24"), netip.MustParsePrefix("10.9.0.2/32"),
		netip.MustParsePrefix("fd00:1::2/64")}, a.Addresses)
	assert.Equal(t, "net1", b.GuestName)
	assert.Equal(t, []netip.Prefix{netip.MustParsePrefix("10.2.0.2/16")}, b.Addresses)

	p, ad := netip.MustParsePrefix, netip.MustParseAddr
	assert.ElementsMatch(t, []Route{
		{Interface: "eth0", Destination: p("10.1.0.0/24"), Source: ad("10.1.0.2"), Scope: unix.RT_SCOPE_LINK},
		{Interface: "eth0", Destination: p("169.254.1.1/32"), Scope: unix.RT_SCOPE_LINK},
		{Interface: "eth0", Destination: p("fd00:1::/64"), Metric: 256},
		{Interface: "eth0", Destination: p("10.50.0.0/16"), Gateway: ad("10.1.0.9"), Source: ad("10.1.0.2"), Metric: 77, MTU: 1300},
		{Interface: "net1", Destination: p("10.60.0.0/16"), Gateway: ad("192.168.7.1"), OnLink: true},
		{Interface: "eth0", Destination: p("10.70.0.0/16"), Gateway: ad("fd00:1::1")},
		{Interface: "eth0", Destination: p("0.0.0.0/0"), Gateway: ad("169.254.1.1")},
		{Interface: "eth0", Destination: p("::/0"), Gateway: ad("fd00:1::1"), Metric: 1024},
	}, n.Routes)
	last := -1
	for _, r := range n.Routes {
		assert.GreaterOrEqual(t, rank(r), last)
		last = rank(r)
	}
	assert.ElementsMatch(t, []Neighbour{
		{"eth0", ad("169.254.1.1"), peerMAC},
		{"eth0", ad("fd00:1::1"), peerMAC},
	}, n.Neighbours)

	// A second VM on the same namespace is a mistake.
	_, err = Attach(context.Background(), podNs.File(), "sandbox")
	assert.True(t, errdefs.IsAlreadyExists(err), "%v", err)
	require.NoError(t, n.Close())
	assertClean(t, pod, "eth0", "net1")
}

// A second VM that is refused, and what cleans up after it, leave the first one's network as it is.
func TestSecondVMTouchesNothing(t *testing.T) {
	needRoot(t)
	hostNs, host := newNs(t)
	podNs, pod := newNs(t)
	addVeth(t, host, podNs, pod, "peer0", "eth0", podMAC)
	first, err := Attach(context.Background(), podNs.File(), "first")
	require.NoError(t, err)
	defer first.Close()
	carries := func() {
		in := frame(podMAC, peerMAC, "frame")
		_, err := packetSocket(t, hostNs, "peer0").Write(in)
		require.NoError(t, err)
		require.True(t, bytes.HasPrefix(expect(t, first.Interfaces[0].Tap, vnetHdrLen), in))
	}
	_, err = Attach(context.Background(), podNs.File(), "second")
	require.True(t, errdefs.IsAlreadyExists(err), "%v", err)
	require.ErrorContains(t, err, "put the containers into one pod")
	carries()
	require.NoError(t, Cleanup(podNs.Path(), "second"))
	carries()

	// Its shim is gone and its VMM lives: still nobody else's.
	vmm, err := unix.Dup(int(first.Interfaces[0].Tap.Fd()))
	require.NoError(t, err)
	tap := os.NewFile(uintptr(vmm), "vmm")
	defer tap.Close()
	require.NoError(t, first.Interfaces[0].Tap.Close())
	first.Interfaces[0].Tap = tap
	require.NoError(t, Cleanup(podNs.Path(), "second"))
	carries()
	require.NoError(t, Cleanup(podNs.Path(), "first"))
	assertClean(t, pod, "eth0")
}

func TestCleanupAfterKill(t *testing.T) {
	needRoot(t)
	hostNs, host := newNs(t)
	podNs, pod := newNs(t)
	addVeth(t, host, podNs, pod, "peer0", "eth0", podMAC)
	n, err := Attach(context.Background(), podNs.File(), "sandbox")
	require.NoError(t, err)

	// The VMM has the fd and outlives the shim.
	vmm, err := unix.Dup(int(n.Interfaces[0].Tap.Fd()))
	require.NoError(t, err)
	require.NoError(t, n.Interfaces[0].Tap.Close())
	require.NoError(t, Cleanup(podNs.Path(), "sandbox"))
	assertClean(t, pod, "eth0")
	require.NoError(t, Cleanup(podNs.Path(), "sandbox"), "repeated")
	require.NoError(t, unix.Close(vmm))

	// Both are gone: the tap with them, the qdisc stays. A new Attach takes over as well.
	n2, err := Attach(context.Background(), podNs.File(), "sandbox")
	require.NoError(t, err)
	require.NoError(t, n2.Interfaces[0].Tap.Close())
	link, err := pod.LinkByName("eth0")
	require.NoError(t, err)
	state, err := ingressOf(pod, link)
	require.NoError(t, err)
	require.Equal(t, ingressStale, state)
	n3, err := Attach(context.Background(), podNs.File(), "sandbox")
	require.NoError(t, err)
	in := frame(podMAC, peerMAC, "again")
	_, err = packetSocket(t, hostNs, "peer0").Write(in)
	require.NoError(t, err)
	assert.True(t, bytes.HasPrefix(expect(t, n3.Interfaces[0].Tap, vnetHdrLen), in))
	require.NoError(t, n3.Close())
	assertClean(t, pod, "eth0")
	n.ns.Close()
	n2.ns.Close()

	for _, path := range []string{"", "/nonexistent/netns", "/proc/self/ns/net", os.DevNull} {
		assert.NoError(t, Cleanup(path, "sandbox"), path)
	}
}

func TestCloseAfterNamespaceIsGone(t *testing.T) {
	needRoot(t)
	_, host := newNs(t)
	podNs, pod := newNs(t)
	eth0 := addVeth(t, host, podNs, pod, "peer0", "eth0", podMAC)
	n, err := Attach(context.Background(), podNs.File(), "sandbox")
	require.NoError(t, err)
	require.NoError(t, pod.LinkDel(eth0))
	require.NoError(t, podNs.Close())
	require.NoError(t, n.Close())
	require.NoError(t, n.Close())
}

func TestNoInterfaces(t *testing.T) {
	needRoot(t)
	podNs, _ := newNs(t)
	n, err := Attach(context.Background(), podNs.File(), "sandbox")
	require.NoError(t, err)
	assert.Empty(t, n.Interfaces)
	assert.Empty(t, n.Routes)
	require.NoError(t, n.Close())
}

func TestRefused(t *testing.T) {
	needRoot(t)
	for _, tc := range []struct {
		name  string
		setUp func(t *testing.T, ns *Namespace, h *netlink.Handle, eth0 netlink.Link)
		text  string
		is    func(error) bool
	}{
		{"bridge", func(t *testing.T, _ *Namespace, h *netlink.Handle, eth0 netlink.Link) {
			br := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "br0"}}
			require.NoError(t, h.LinkAdd(br))
			require.NoError(t, h.LinkSetUp(br))
		}, `interface "br0" of kind bridge is not supported`, errdefs.IsNotImplemented},
		{"port of a bridge", func(t *testing.T, _ *Namespace, h *netlink.Handle, eth0 netlink.Link) {
			br := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "br0"}}
			require.NoError(t, h.LinkAdd(br))
			require.NoError(t, h.LinkSetMaster(eth0, br))
		}, "port of another interface", errdefs.IsNotImplemented},
		{"foreign tap", func(t *testing.T, ns *Namespace, h *netlink.Handle, eth0 netlink.Link) {
			tap, err := newTap(context.Background(), ns.File(), "tap9")
			require.NoError(t, err)
			t.Cleanup(func() { tap.Close() })
			link, err := h.LinkByName("tap9")
			require.NoError(t, err)
			require.NoError(t, h.LinkSetUp(link))
		}, `interface "tap9" of kind tuntap`, errdefs.IsNotImplemented},
		{"same MAC", func(t *testing.T, ns *Namespace, h *netlink.Handle, eth0 netlink.Link) {
			_, host := newNs(t)
			addVeth(t, host, ns, h, "peer1", "net1", podMAC)
		}, "same MAC address 02:00:00:00:00:02", errdefs.IsNotImplemented},
		{"foreign qdisc", func(t *testing.T, _ *Namespace, h *netlink.Handle, eth0 netlink.Link) {
			require.NoError(t, h.QdiscAdd(ingress(eth0)))
			require.NoError(t, h.FilterAdd(&netlink.U32{
				FilterAttrs: netlink.FilterAttrs{LinkIndex: eth0.Attrs().Index, Parent: ingressParent, Priority: 1, Protocol: unix.ETH_P_ALL},
				Actions:     []netlink.Action{netlink.NewMirredAction(eth0.Attrs().Index)},
			}))
		}, "Cloister did not make", errdefs.IsFailedPrecondition},
		{"blackhole route", func(t *testing.T, _ *Namespace, h *netlink.Handle, eth0 netlink.Link) {
			require.NoError(t, h.RouteAdd(&netlink.Route{Dst: cidr(t, "10.66.0.0/16"), Type: unix.RTN_BLACKHOLE}))
		}, "only unicast routes", errdefs.IsNotImplemented},
		{"another table", func(t *testing.T, _ *Namespace, h *netlink.Handle, eth0 netlink.Link) {
			require.NoError(t, h.RouteAdd(&netlink.Route{LinkIndex: eth0.Attrs().Index, Dst: cidr(t, "10.80.0.0/16"), Table: 100,
				Scope: netlink.SCOPE_LINK}))
		}, "only the main routing table", errdefs.IsNotImplemented},
		{"policy rule", func(t *testing.T, _ *Namespace, h *netlink.Handle, eth0 netlink.Link) {
			r := netlink.NewRule()
			r.Src, r.Table, r.Priority = cidr(t, "10.1.0.0/24"), unix.RT_TABLE_MAIN, 100
			require.NoError(t, h.RuleAdd(r))
		}, "policy rule ip rule 100", errdefs.IsNotImplemented},
		{"policy rule of IPv6", func(t *testing.T, _ *Namespace, h *netlink.Handle, eth0 netlink.Link) {
			r := netlink.NewRule()
			r.Family, r.Mark, r.Table = netlink.FAMILY_V6, 7, 100
			require.NoError(t, h.RuleAdd(r))
		}, "policy rule", errdefs.IsNotImplemented},
		{"address of loopback", func(t *testing.T, _ *Namespace, h *netlink.Handle, eth0 netlink.Link) {
			lo, err := h.LinkByName("lo")
			require.NoError(t, err)
			addAddr(t, h, lo, "10.99.0.1/32", 0)
		}, "address 10.99.0.1/32 of lo", errdefs.IsNotImplemented},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, host := newNs(t)
			podNs, pod := newNs(t)
			eth0 := addVeth(t, host, podNs, pod, "peer0", "eth0", podMAC)
			tc.setUp(t, podNs, pod, eth0)
			_, err := Attach(context.Background(), podNs.File(), "sandbox")
			require.Error(t, err)
			assert.True(t, tc.is(err), "%v", err)
			assert.Contains(t, err.Error(), tc.text)
			_, err = pod.LinkByName(tapNames("sandbox") + "0")
			assert.Error(t, err, "a tap device is left")
			assert.NoError(t, Cleanup(podNs.Path(), "sandbox"))
			if tc.name == "foreign qdisc" {
				state, err := ingressOf(pod, eth0)
				require.NoError(t, err)
				assert.Equal(t, ingressForeign, state, "others' filters are not touched")
			}
		})
	}
}

func TestHostNamespaceIsRefused(t *testing.T) {
	f, err := os.Open("/proc/self/ns/net")
	require.NoError(t, err)
	defer f.Close()
	_, err = Attach(context.Background(), f, "sandbox")
	assert.True(t, errdefs.IsNotImplemented(err), "%v", err)
	for _, path := range []string{"", "/proc/self/ns/net"} {
		_, err = Open(path)
		var u *UnsupportedError
		require.ErrorAs(t, err, &u)
		assert.Contains(t, err.Error(), "hostNetwork")
	}
	for path, is := range map[string]func(error) bool{
		"/nonexistent":      errdefs.IsNotFound,
		os.DevNull:          errdefs.IsInvalidArgument,
		"/proc/self/ns/mnt": errdefs.IsInvalidArgument,
		t.TempDir():         errdefs.IsInvalidArgument,
	} {
		_, err = Open(path)
		assert.True(t, is(err), "%s: %v", path, err)
	}
}

func TestCancelledAttachLeavesNothing(t *testing.T) {
	needRoot(t)
	_, host := newNs(t)
	podNs, pod := newNs(t)
	addVeth(t, host, podNs, pod, "peer0", "eth0", podMAC)
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	_, err := Attach(ctx, podNs.File(), "sandbox")
	assert.ErrorIs(t, err, context.Canceled)
	assertClean(t, pod, "eth0")
}

func TestNewNetns(t *testing.T) {
	needRoot(t)
	before, err := os.Readlink("/proc/self/ns/net")
	require.NoError(t, err)
	for range 20 {
		n, err := NewNetns()
		require.NoError(t, err)
		st, err := n.File().Stat()
		require.NoError(t, err)
		byPath, err := os.Stat(n.Path())
		require.NoError(t, err)
		assert.True(t, os.SameFile(st, byPath))
		h, err := handle(n.File())
		require.NoError(t, err)
		lo, err := h.LinkByName("lo")
		require.NoError(t, err)
		assert.NotZero(t, lo.Attrs().Flags&net.FlagUp)
		h.Close()
		tid := n.TID()
		assert.NotEqual(t, os.Getpid(), tid)
		require.NoError(t, n.Close())
		require.NoError(t, n.Close())
		// The thread left the namespace, or is gone by now.
		if now, err := os.Stat(fmt.Sprintf("/proc/%d/ns/net", tid)); err == nil {
			assert.False(t, os.SameFile(st, now))
		}
		after, err := os.Readlink("/proc/self/ns/net")
		require.NoError(t, err)
		assert.Equal(t, before, after)
	}
}
