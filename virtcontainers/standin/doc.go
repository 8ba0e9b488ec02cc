// SPDX-License-Identifier: Apache-2.0

// Package standin gives each container a process id on the host. A container's processes are the guest's, and their numbers
// there mean nothing to containerd, which makes paths of the pid that it is told: /proc/PID/ns/pid is how its CRI tells which
// container's pid namespace another one is to join.
//
// A stand-in is a thread of this process that sleeps. Its id is no other process's, /proc/ID exists as long as the thread
// does, and what a client finds there is the pod's or nothing: the network namespace is the pod's, root and working directory
// are one that does not exist any more, so that what writes into a container by /proc/ID/root (nerdctl cp) fails in place of
// writing to the host.
//
// It is a thread and no process of its own since a process needs a program, which would be one more file to install, or one
// in memory that watchers of hosts take for an attack. The price: ps lists no threads, and a signal that somebody sends to
// the id by himself hits the shim, and the whole pod with it.
//
// # States
//
//	running --Close--> gone
//
// Nothing outlives this process.
package standin
