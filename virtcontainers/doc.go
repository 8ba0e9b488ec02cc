// SPDX-License-Identifier: Apache-2.0

// Package virtcontainers is the host side of pods: one controller each for a pod, its containers and their processes.
// It uses hypervisor and the agent's client and knows nothing of ttrpc servers or containerd's events; package shim
// does that on top.
//
// # States of a pod
//
//	created --Start--> ready --Stop, VM lost--> stopped
//	created --Start fails, Stop--> stopped
//
// NewPod only checks. Start makes network, boot files and VM, waits for the agent and configures it; if it fails
// everything is undone. A pod in stopped holds nothing any more; its exit says why it ended.
//
// # Confidential pods
//
// A pod's platform (package tee) is chosen by configuration and never replaced by another. Start goes: configuration,
// size and document (launch.go, document.go), the platform's Probe before anything is made, initdata's disk, the
// platform's Prepare, the VMM, and the comparison of the guest's Hello with what was asked. Package dryrun is the same without
// the host. A confidential VM shares no files with the host: confidential.go and package volumes give it copies and
// folders in its own memory, and refuse the rest with the reason. Nothing here protects the guest: these rules make errors
// that people can act on; the guest enforces its own.
//
// # States of a process
//
//	created --Start--> running <--Pause/Resume--> paused
//	created, running, paused --exit, VM lost--> stopped --Delete--> gone
//
// Exits are final, and known, in the order in which the guest reports them; that an init's is told last is the business of
// who tells of it (shim/task). A process's output has been delivered before its exit is known.
//
// # Locks
//
// Each controller has one mutex that guards fields only; it is never held across an RPC, a call of the VMM or any
// I/O. Steps that must not overlap (two Starts) are kept apart by the state, which changes before the work begins.
//
// # Trust
//
// The guest is hostile to this side: what the agent answers is checked, bounded and translated, never forwarded. In
// the other direction this package keeps host paths, ids and devices out of what goes to the guest, but a
// confidential guest does not rely on that.
package virtcontainers
