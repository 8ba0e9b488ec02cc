// SPDX-License-Identifier: Apache-2.0

// Package network sets up the pod's network in the guest: the guest's root network namespace, which all containers of
// the pod share.
//
// Apply takes the whole of what the pod's network should be and makes it so: it has no memory, and applying the same
// again changes nothing. NICs are found by hardware address, never by the order or name that the kernel gave them.
// Addresses, routes and permanent neighbours of these NICs that are not asked for are removed, except for what the
// kernel makes by itself (link-local addresses, routes of prefixes on the link).
//
// Calls must not overlap; the server makes them one after the other. The host is trusted with the pod's connectivity
// (it carries every packet) and with nothing else: names, sizes and counts are checked before anything is changed.
package network
