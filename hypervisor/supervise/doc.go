// SPDX-License-Identifier: Apache-2.0

// Package supervise keeps a VMM's process: what every driver does in the same way, whichever VMM it starts.
//
// Start runs the VMM on a thread of its own, so that it dies with this process (the parent-death signal follows the parent's
// thread) and is reaped by it. Logs keeps what the VMM and the guest's console write, bounded, on disk and in memory, and
// quotes it for the error of a pod. The words that every VM's end has in common are here, too.
//
// # Goroutines
//
// One per process, until it is reaped; two per Logs, from Copy until Drain. The owner waits for both.
//
// # Trust
//
// What is logged is written by the guest, or by a VMM that it has taken over: everything is bounded and stripped of control
// characters before anybody sees it.
package supervise
