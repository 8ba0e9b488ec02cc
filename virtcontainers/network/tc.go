// SPDX-License-Identifier: Apache-2.0

package network

import (
	"errors"
	"fmt"

	"github.com/containerd/errdefs"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// filterPriority marks filters as Cloister's; whose they are tells the tap device that they redirect to.
const filterPriority = 0xc105

var ingressParent = netlink.MakeHandle(0xffff, 0)

func ingress(l netlink.Link) *netlink.Ingress {
	return &netlink.Ingress{QdiscAttrs: netlink.QdiscAttrs{
		LinkIndex: l.Attrs().Index,
		Handle:    ingressParent,
		Parent:    netlink.HANDLE_INGRESS,
	}}
}

// ingressState is who uses an interface's ingress hook.
type ingressState int

const (
	ingressFree    ingressState = iota // no qdisc
	ingressEmpty                       // a qdisc without filters
	ingressStale                       // filters of ours only, to a device that is gone: left by a killed shim
	ingressInUse                       // filters of ours, to a device that is there
	ingressForeign                     // filters of others
)

func ingressOf(h *netlink.Handle, l netlink.Link) (ingressState, error) {
	qdiscs, err := dump(func() ([]netlink.Qdisc, error) { return h.QdiscList(l) })
	if err != nil {
		return 0, fmt.Errorf("list qdiscs of interface %q: %w", l.Attrs().Name, err)
	}
	found := false
	for _, q := range qdiscs {
		// clsact has the same parent and an egress hook too: always somebody else's.
		if q.Attrs().Parent == netlink.HANDLE_INGRESS {
			if q.Type() != "ingress" {
				return ingressForeign, nil
			}
			found = true
		}
	}
	if !found {
		return ingressFree, nil
	}
	filters, err := dump(func() ([]netlink.Filter, error) { return h.FilterList(l, ingressParent) })
	if err != nil {
		return 0, fmt.Errorf("list filters of interface %q: %w", l.Attrs().Name, err)
	}
	state := ingressEmpty
	for _, f := range filters {
		if f.Attrs().Priority != filterPriority {
			return ingressForeign, nil
		}
		if state == ingressInUse {
			continue
		}
		state = ingressStale
		inUse, err := redirects(h, f)
		if err != nil {
			return 0, fmt.Errorf("find the device that frames of %q go to: %w", l.Attrs().Name, err)
		}
		if inUse {
			state = ingressInUse
		}
	}
	return state, nil
}

// redirects reports whether a filter of ours sends frames to a device that is there. The kernel says 0 of one that is gone.
func redirects(h *netlink.Handle, f netlink.Filter) (bool, error) {
	var actions []netlink.Action
	switch f := f.(type) {
	case *netlink.MatchAll:
		actions = f.Actions
	case *netlink.U32:
		actions = f.Actions
	}
	for _, a := range actions {
		mirred, ok := a.(*netlink.MirredAction)
		if !ok || mirred.Ifindex == 0 {
			continue
		}
		// Looked up now and not in a list from before: a new VM's tap is there before its filter.
		_, err := h.LinkByIndex(mirred.Ifindex)
		if err == nil {
			return true, nil
		}
		if !isGone(err) {
			return false, err
		}
	}
	return false, nil
}

// claim makes sure that the interface's ingress hook is free, and clears what a killed shim left there.
func claim(h *netlink.Handle, l netlink.Link) error {
	state, err := ingressOf(h, l)
	if err != nil {
		return err
	}
	switch state {
	case ingressFree:
		return nil
	case ingressForeign:
		return fmt.Errorf("interface %q has a tc ingress or clsact qdisc that Cloister did not make; remove it (tc qdisc del dev %s ingress) "+
			"or the CNI plugin that sets it: %w",
			l.Attrs().Name, l.Attrs().Name, errdefs.ErrFailedPrecondition)
	case ingressInUse:
		return joinedError(l.Attrs().Name)
	}
	if err := h.QdiscDel(ingress(l)); err != nil && !isGone(err) && !errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("remove stale ingress qdisc of interface %q: %w", l.Attrs().Name, err)
	}
	return nil
}

// release removes the ingress qdisc, if it is ours and nobody's frames depend on it.
func release(h *netlink.Handle, l netlink.Link) error {
	state, err := ingressOf(h, l)
	if isGone(err) {
		return nil
	}
	if err != nil || state != ingressStale {
		return err
	}
	// EINVAL is what the kernel says of a qdisc that is not there.
	if err := h.QdiscDel(ingress(l)); err != nil && !isGone(err) && !errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("remove ingress qdisc of interface %q: %w", l.Attrs().Name, err)
	}
	return nil
}

// redirect sends every frame that arrives at from out of to.
func redirect(h *netlink.Handle, from, to netlink.Link, forceU32 bool) error {
	names := fmt.Sprintf("mirror %q to %q", from.Attrs().Name, to.Attrs().Name)
	if err := h.QdiscAdd(ingress(from)); err != nil {
		return fmt.Errorf("%s: ingress qdisc (kernel option NET_SCH_INGRESS, module sch_ingress): %w", names, err)
	}
	attrs := netlink.FilterAttrs{
		LinkIndex: from.Attrs().Index,
		Parent:    ingressParent,
		Priority:  filterPriority,
		Protocol:  unix.ETH_P_ALL,
	}
	action := func() []netlink.Action { return []netlink.Action{netlink.NewMirredAction(to.Attrs().Index)} }

	matchall := errors.New("left out")
	if !forceU32 {
		if matchall = h.FilterAdd(&netlink.MatchAll{FilterAttrs: attrs, Actions: action()}); matchall == nil {
			return nil
		}
	}
	// A selector without keys matches everything, even a frame that has no byte behind its Ethernet header.
	sel := &nl.TcU32Sel{Flags: nl.TC_U32_TERMINAL}
	u32 := h.FilterAdd(&netlink.U32{FilterAttrs: attrs, Sel: sel, Actions: action()})
	if u32 == nil {
		return nil
	}
	return fmt.Errorf("%s: tc filter: matchall (cls_matchall): %w; u32 (cls_u32): %w; both need act_mirred: load one of the two and "+
		"act_mirred: %w",
		names, matchall, u32, errdefs.ErrFailedPrecondition)
}
