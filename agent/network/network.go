// SPDX-License-Identifier: Apache-2.0

package network

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	agentv1 "github.com/cloister-project/cloister/agent-protocol/v1"
)

// Apply makes the pod's network what n says. It waits for NICs that are not there yet until ctx ends. After an error the
// network may be half of what was asked; applying again is the way on.
func Apply(ctx context.Context, n *agentv1.Network) error {
	p, err := newPlan(n)
	if err != nil {
		return err
	}
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("open netlink: %w", err)
	}
	defer h.Close()
	lo, err := h.LinkByName(loopback)
	if err != nil {
		return fmt.Errorf("find the loopback interface: %w", err)
	}
	if err := h.LinkSetUp(lo); err != nil {
		return fmt.Errorf("bring the loopback interface up: %w", err)
	}
	links, err := waitForNICs(ctx, h, p.nics)
	if err != nil {
		return err
	}
	if err := rename(h, p.nics, links); err != nil {
		return err
	}
	index := map[string]int{loopback: lo.Attrs().Index}
	for i, nic := range p.nics {
		index[nic.name] = links[i].Attrs().Index
		if err := configure(h, nic, links[i]); err != nil {
			return fmt.Errorf("interface %s (%s): %w", nic.name, nic.mac, err)
		}
	}
	if err := setRoutes(h, p.routes, index); err != nil {
		return err
	}
	return setNeighbours(h, p.neighbours, index)
}

// waitForNICs finds the NICs by their hardware addresses, in the order in which they are asked for.
func waitForNICs(ctx context.Context, h *netlink.Handle, nics []nic) ([]netlink.Link, error) {
	updates := make(chan netlink.LinkUpdate, 64)
	done := make(chan struct{})
	defer func() {
		close(done)
		for range updates { // until the subscription has closed it
		}
	}()
	// Subscribed before the first look, so that no NIC comes unseen in between.
	var failure error // written before the channel is closed, read after
	err := netlink.LinkSubscribeWithOptions(updates, done, netlink.LinkSubscribeOptions{ErrorCallback: func(err error) { failure = err }})
	if err != nil {
		close(updates)
		return nil, fmt.Errorf("listen for new interfaces: %w", err)
	}
	for {
		links, missing, err := findNICs(h, nics)
		if err != nil || missing == nil {
			return links, err
		}
		select {
		case _, more := <-updates:
			if !more {
				return nil, fmt.Errorf("listen for new interfaces: %w", failure)
			}
		case <-ctx.Done():
			return nil, fmt.Errorf("wait for the NIC with hardware address %s, which becomes %s: %w", missing.mac, missing.name, context.Cause(ctx))
		}
	}
}

func findNICs(h *netlink.Handle, nics []nic) (links []netlink.Link, missing *nic, err error) {
	all, err := h.LinkList()
	if err != nil {
		return nil, nil, fmt.Errorf("list interfaces: %w", err)
	}
	for i := range nics {
		at := slices.IndexFunc(all, func(l netlink.Link) bool { return bytes.Equal(l.Attrs().HardwareAddr, nics[i].mac) })
		if at < 0 {
			return nil, &nics[i], nil
		}
		links = append(links, all[at])
	}
	return links, nil, nil
}

// rename gives the NICs their names. Names may have to change places, so that those in the way get others first.
func rename(h *netlink.Handle, nics []nic, links []netlink.Link) error {
	for i, nic := range nics {
		at := links[i].Attrs()
		if at.Name == nic.name {
			continue
		}
		// A NIC that has its name cannot be the one in the way.
		if other, err := h.LinkByName(nic.name); err == nil {
			if err := setName(h, other, fmt.Sprintf("was%d", other.Attrs().Index)); err != nil {
				return err
			}
			for _, l := range links {
				if l.Attrs().Index == other.Attrs().Index {
					l.Attrs().Name = fmt.Sprintf("was%d", other.Attrs().Index)
				}
			}
		}
		if err := setName(h, links[i], nic.name); err != nil {
			return err
		}
		at.Name = nic.name
	}
	return nil
}

func setName(h *netlink.Handle, l netlink.Link, name string) error {
	// An interface that is up keeps its name; configure brings it up again.
	err := h.LinkSetDown(l)
	if err == nil {
		err = h.LinkSetName(l, name)
	}
	if err != nil {
		return fmt.Errorf("rename interface %s to %s: %w", l.Attrs().Name, name, err)
	}
	return nil
}

// configure sets a NIC's MTU and addresses and brings it up.
func configure(h *netlink.Handle, nic nic, l netlink.Link) error {
	if nic.mtu > 0 && l.Attrs().MTU != nic.mtu {
		if err := h.LinkSetMTU(l, nic.mtu); err != nil {
			return fmt.Errorf("set MTU %d: %w", nic.mtu, err)
		}
	}
	// The host's side has checked the addresses, and a pod that starts must not wait a second for each. This is for the
	// link-local address that the kernel makes.
	if err := os.WriteFile(filepath.Join("/proc/sys/net/ipv6/conf", nic.name, "accept_dad"), []byte("0"), 0); err != nil &&
		!os.IsNotExist(err) {
		return fmt.Errorf("turn duplicate address detection off: %w", err)
	}
	have, err := h.AddrList(l, netlink.FAMILY_ALL)
	if err != nil {
		return fmt.Errorf("list addresses: %w", err)
	}
	for _, a := range have {
		prefix, ok := prefixOf(a.IPNet)
		if ok && slices.Contains(nic.addresses, prefix) || a.IP.IsLinkLocalUnicast() && a.IP.To4() == nil {
			continue
		}
		if err := h.AddrDel(l, &a); err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) {
			return fmt.Errorf("remove address %s: %w", a.IPNet, err)
		}
	}
	for _, prefix := range nic.addresses {
		addr := &netlink.Addr{IPNet: ipNet(prefix)}
		if prefix.Addr().Is6() {
			addr.Flags = unix.IFA_F_NODAD
		}
		if err := h.AddrReplace(l, addr); err != nil {
			return fmt.Errorf("add address %s: %w", prefix, err)
		}
	}
	if err := h.LinkSetUp(l); err != nil {
		return fmt.Errorf("bring it up: %w", err)
	}
	return nil
}

// ipNet and prefixOf keep the bits beyond the length: an address with its prefix.
func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

func prefixOf(n *net.IPNet) (netip.Prefix, bool) {
	if n == nil {
		return netip.Prefix{}, false
	}
	addr, ok := netip.AddrFromSlice(n.IP)
	bits, _ := n.Mask.Size()
	if _, size := n.Mask.Size(); size == 32 {
		addr = addr.Unmap()
	}
	return netip.PrefixFrom(addr, bits), ok
}
