// SPDX-License-Identifier: Apache-2.0

// Package uevent waits for devices of the guest, which come when the host plugs them in. The kernel tells of them on a netlink socket
// (NETLINK_KOBJECT_UEVENT); there is no udev.
//
// A Listener has no states but open and closed, and no locks; one goroutine at a time waits on it. Only the kernel's own messages are
// taken, and of these only the subsystem is read: what there is, the caller looks up itself.
package uevent
