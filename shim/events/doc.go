// SPDX-License-Identifier: Apache-2.0

// Package events carries task events to containerd in the order in which they were queued.
//
// Whoever has an event hands it to Queue.Publish, which never blocks. One goroutine sends: the event at the head until
// containerd took it, then the next, so that a containerd that restarts sees no exit before its start. The publisher
// of containerd/pkg/shim is not used because it sends an event that failed later, behind its successors.
//
// The queue is bounded. When containerd is away for so long that it is full, the oldest events go first: after its
// restart containerd asks for the state of each task anyway.
//
// The queue has one mutex, which guards the list only. Its goroutine ends with Close.
package events
