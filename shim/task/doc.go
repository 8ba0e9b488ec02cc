// SPDX-License-Identifier: Apache-2.0

// Package task is containerd's Task service, versions 2 and 3, on top of a pod.
//
// # What a task is
//
// Create looks at the specification's annotations. CRI's pause container (container-type "sandbox") makes the pod and
// is nothing but its stand-in: it runs as long as the pod, and killing it stops the pod. A container of CRI, or any
// container of a pod that the Sandbox service made, goes into that pod. A container without CRI gets a pod of its own,
// which ends when the container is deleted.
//
// # States
//
//	reserved --Create works--> created --Start--> running --exit--> stopped --Delete--> deleted
//	reserved --Create fails, undone--> gone
//	created --Delete (kills), kill--> stopped
//
// A reserved task is visible to nobody but Delete, which waits for it: containerd deletes at once what it gave up
// creating. Delete runs to its end even when its caller leaves; the caller that comes back joins it, and one that comes
// later still gets the result of the last deletions.
//
// # Order of events
//
// Each process has one goroutine that waits for its end. It publishes the exit after the start's event (Start holds a
// gate until that is queued), for an init after the exits of all other processes of the container, and for a pause
// container after those of the pod's containers. containerd relies on it: it takes a container whose init has exited for
// one without processes.
//
// This package is the order's only owner, since it is where events are made. The guest is not trusted, and may report exits
// in any order or not at all; package virtcontainers hands them on as they come. An exec that is not reported within a
// minute of its container's init is given up: its exit is published as if it was killed, or, where its Start is still under
// way, that fails. A kill by the OOM killer is published by the pod before the process's
// Wait returns, and held back while the container's start is under way. Delete publishes after the exit. All events go
// through one queue.
//
// # Process ids
//
// The processes live in the guest; their numbers there mean nothing on the host, where a consumer of Pids would take
// them for those of the host's own processes (containerd's CRI counts the file descriptors of each). A container has a
// pid on the host (virtcontainers/standin) that stands for all of its processes, in events, State, Connect and Pids alike; a
// pause container's is the VMM's. Pids has one entry for the container and one for each running exec.
//
// # Locks
//
// Service.mu guards the table of tasks, task.mu a task's table of execs and its deletion, process.mu a process's
// progress. They are taken in this order and never held over a call of the pod.
package task
