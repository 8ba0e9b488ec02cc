// SPDX-License-Identifier: Apache-2.0

package network

import (
	"bytes"
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

func needRoot(t *testing.T) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("makes network namespaces: needs root")
	}
	if _, err := os.Stat(tunDevice); err != nil {
		t.Skipf("makes tap devices: %v", err)
	}
}

func newNs(t *testing.T) (*Namespace, *netlink.Handle) {
	t.Helper()
	ns, err := NewNetns()
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, ns.Close()) })
	h, err := handle(ns.File())
	require.NoError(t, err)
	t.Cleanup(h.Close)
	return ns, h
}

var (
	podMAC  = net.HardwareAddr{0x02, 0, 0, 0, 0, 0x02}
	peerMAC = net.HardwareAddr{0x02, 0, 0, 0, 0, 0x01}
)

// addVeth makes the pair peer (in hostNs) and name (in podNs), both up.
func addVeth(t *testing.T, host *netlink.Handle, podNs *Namespace, pod *netlink.Handle, peer, name string,
	mac net.HardwareAddr) netlink.Link {
	t.Helper()
	v := &netlink.Veth{LinkAttrs: netlink.NewLinkAttrs(), PeerName: name, PeerHardwareAddr: mac,
		PeerNamespace: netlink.NsFd(podNs.File().Fd())}
	v.Name, v.HardwareAddr, v.MTU = peer, peerMAC, 1400
	require.NoError(t, host.LinkAdd(v))
	l, err := pod.LinkByName(name)
	require.NoError(t, err)
	// Nothing on these links but what the test sends.
	require.NoError(t, host.LinkSetIP6AddrGenMode(v, 1))
	require.NoError(t, pod.LinkSetMTU(l, 1400))
	require.NoError(t, host.LinkSetUp(v))
	require.NoError(t, pod.LinkSetUp(l))
	return l
}

// addMacvlan makes a pair peer0 and trunk0 in hostNs, and a macvlan interface of trunk0 as eth0 in podNs.
func addMacvlan(t *testing.T, host *netlink.Handle, podNs *Namespace, pod *netlink.Handle) netlink.Link {
	t.Helper()
	v := &netlink.Veth{LinkAttrs: netlink.NewLinkAttrs(), PeerName: "trunk0"}
	v.Name, v.HardwareAddr, v.MTU = "peer0", peerMAC, 1400
	require.NoError(t, host.LinkAdd(v))
	trunk, err := host.LinkByName("trunk0")
	require.NoError(t, err)
	for _, l := range []netlink.Link{v, trunk} {
		require.NoError(t, host.LinkSetIP6AddrGenMode(l, 1))
		require.NoError(t, host.LinkSetMTU(l, 1400))
		require.NoError(t, host.LinkSetUp(l))
	}
	m := &netlink.Macvlan{LinkAttrs: netlink.NewLinkAttrs(), Mode: netlink.MACVLAN_MODE_BRIDGE}
	m.Name, m.ParentIndex, m.HardwareAddr, m.Namespace = "eth0", trunk.Attrs().Index, podMAC, netlink.NsFd(podNs.File().Fd())
	if err := host.LinkAdd(m); errors.Is(err, unix.EOPNOTSUPP) {
		t.Skip("the kernel has no macvlan")
	}
	l, err := pod.LinkByName("eth0")
	require.NoError(t, err)
	require.NoError(t, pod.LinkSetMTU(l, 1400))
	require.NoError(t, pod.LinkSetUp(l))
	return l
}

func addAddr(t *testing.T, h *netlink.Handle, l netlink.Link, addr string, flags int) {
	t.Helper()
	a, err := netlink.ParseAddr(addr)
	require.NoError(t, err)
	a.Flags = flags
	require.NoError(t, h.AddrAdd(l, a))
}

func cidr(t *testing.T, s string) *net.IPNet {
	t.Helper()
	_, n, err := net.ParseCIDR(s)
	require.NoError(t, err)
	return n
}

// packetSocket reads and writes raw frames of an interface.
func packetSocket(t *testing.T, ns *Namespace, name string) *os.File {
	t.Helper()
	var f *os.File
	require.NoError(t, Inside(ns.File(), func() error {
		ifi, err := net.InterfaceByName(name)
		if err != nil {
			return err
		}
		proto := binary.BigEndian.Uint16(binary.NativeEndian.AppendUint16(nil, unix.ETH_P_ALL))
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, int(proto))
		if err != nil {
			return err
		}
		f = os.NewFile(uintptr(fd), "packet")
		return unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: proto, Ifindex: ifi.Index})
	}))
	t.Cleanup(func() { f.Close() })
	return f
}

const vnetHdrLen = 10

// frame builds an Ethernet frame of a local experimental type.
func frame(dst, src net.HardwareAddr, payload string) []byte {
	b := append(append(append([]byte{}, dst...), src...), 0x88, 0xb5)
	return append(b, payload...)
}

// expect reads until a frame of the experimental type or ARP comes, and gives it without the vnet header.
func expect(t *testing.T, f *os.File, skip int) []byte {
	t.Helper()
	require.NoError(t, f.SetReadDeadline(time.Now().Add(5*time.Second)))
	buf := make([]byte, 2048)
	for {
		n, err := f.Read(buf)
		require.NoError(t, err, "no frame arrived")
		if b := buf[skip:n]; len(b) >= 14 && (b[12] == 0x88 && b[13] == 0xb5 || b[12] == 0x08 && b[13] == 0x06) {
			return bytes.Clone(b)
		}
	}
}

func arpRequest(target netip.Addr) []byte {
	b := append(append([]byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}, peerMAC...), 0x08, 0x06)
	b = append(b, 0, 1, 8, 0, 6, 4, 0, 1)
	b = append(append(b, peerMAC...), 10, 1, 0, 1)
	return append(append(b, 0, 0, 0, 0, 0, 0), target.AsSlice()...)
}
