// SPDX-License-Identifier: Apache-2.0

// Package portforward takes connections to the loopback of a pod's network namespace to the loopback of its guest.
// containerd's CRI plugin serves `kubectl port-forward` and `crictl port-forward` by connecting to localhost there, where
// nothing of the pod listens: its programs are in the guest.
//
// A BPF program of type sk_lookup (Linux 5.9) is attached to the namespace. The kernel asks it for the listener of each new
// TCP connection to 127.0.0.0/8 and ::1, whatever the port, and it names one of two listeners of this process. An accepted
// connection's local address is the one that was meant, so that its port is known. What comes in by an interface never gets
// here: package network redirects it before.
//
// The port may turn out to be closed after the connection was accepted; it is reset then, where it would have been refused.
//
// # Life
//
// Program, map and listeners are descriptors of this process, and the attachment is one too: all of it ends with the process,
// however that ends. Close ends it earlier.
//
// # Trust
//
// Whoever can enter the namespace can reach the ports that programs in the guest keep to their loopback, as on a node without
// VMs. A confidential guest does not let its host there, and its pods have no Forwarder.
package portforward
