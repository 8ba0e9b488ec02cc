// SPDX-License-Identifier: Apache-2.0

// Package vsock is the one way by which the host side talks to the agent in a guest, whatever carries it: the kernel's
// vhost-vsock, or the vhost-user vsock device embedded in this process (package vhostuser), for hosts without
// /dev/vhost-vsock.
//
// Callers see a Transport for each VM. The guest on the other end is hostile: a transport bounds what it buffers for
// the guest and never trusts an index, a length or a credit that the guest wrote.
package vsock
