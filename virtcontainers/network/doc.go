// SPDX-License-Identifier: Apache-2.0

// Package network connects a pod's network namespace, as CNI left it, to the pod's VM.
//
// Attach finds CNI's interfaces in the namespace, makes a tap device beside each, and moves frames between the two with
// tc: an ingress qdisc on either side whose only filter redirects every frame out of the other. The guest gets the
// interface's name, MAC address, MTU, addresses, routes and permanent neighbours, and so takes the place of the
// namespace's own IP stack.
//
// # Why the interface keeps its addresses in the namespace
//
// The ingress hook runs before the namespace's IP, ARP and IPv6 input: everything that arrives at the interface is
// redirected to the guest and never seen by the host's stack there. So that stack answers no ARP request, no neighbour
// solicitation, no MLD query, and sends no TCP reset, although it has the addresses. What it can still do is speak
// first: router solicitations and unsolicited MLD reports right after CNI set the link up, with the same MAC and IP
// addresses as the guest's; peers learn nothing wrong from them and the answers reach the guest. Duplicate address
// detection is CNI's (it waits for it) and is over when Attach runs; the guest should add the addresses with nodad,
// because an address is still "in use" in the namespace, even if nobody answers for it. A process that joins the
// namespace can send, but gets no answer. CNI's CHECK and DEL find what ADD made. On the tap, which nobody addresses,
// IPv6 is turned off so that the host's stack says nothing to the guest.
//
// All routes of the main table are passed on, those that the kernel derived from addresses too, so the guest should add
// addresses with noprefixroute: a CNI plugin such as ptp removes the derived route on purpose. What the guest's kernel
// makes by itself is left out: link-local addresses and their routes, addresses and routes from router advertisements,
// multicast. Policy routing (ip rule), other tables, VRFs, addresses of loopback, special and multipath routes are refused: a pod
// without them would seem to work, and send its packets elsewhere.
//
// # Life
//
// A tap device is not persistent: it lives while somebody has its fd open, which is this process and the VMM. A SIGKILL
// of both leaves no tap. The qdisc on CNI's interface is left then, and drops all frames; it goes with the namespace,
// or by Cleanup, which needs nothing but the namespace's path and the sandbox's ID: the names of a sandbox's tap devices are
// made of its ID, a filter belongs to the tap that it redirects to, and one whose tap is gone to nobody. So whatever cleans up
// acts on its own sandbox's alone. Close does all of it in order.
//
//	Attach ──▶ attached ──Close──▶ closed      Close may be repeated; a namespace that is gone already is no error
//
// # Locks and threads
//
// A Network's exported fields are immutable after Attach. Close is safe from any goroutine. Work inside a namespace is
// done on an OS thread made for it, that ends afterwards: no thread of the Go scheduler ever stays in a foreign
// namespace. Nothing here is held over I/O with the guest.
//
// # Trust
//
// The namespace's contents come from CNI, which is as trusted as the host; their number is limited all the same. The
// guest's frames are hostile: they leave through the tap only to the interface they belong to. An Attach to the host's
// own network namespace is refused, because it would cut the host off.
package network
