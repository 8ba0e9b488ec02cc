// SPDX-License-Identifier: Apache-2.0

// Package virtcontainers is the host side of pods: one controller each for a pod, its containers and their processes.
// It uses hypervisor and the agent's client and knows nothing of ttrpc servers or containerd's events; package shim
// does that on top.
//
// # States of a pod
//
//	created --Start--> starting
//	starting --the agent is ready--> ready
//	created, starting, ready --Stop, a fault of Start, the end of the VM--> stopped
//
// NewPod only checks. Start makes network, boot files and VM, waits for the agent and configures it; if it fails
// everything is undone. A pod in stopped holds nothing any more; its exit says why it ended.
//
// # A container's way
//
// CreateContainer goes through the parts of this package once, in this order: the allow-list (package ocispec), namespaces
// that are joined and what becomes of each mount (package mounts), which together refuse what cannot be had before anything is
// made; its process id on the host (package standin); the mounts, as planned; its layers' images (package rootfs) as disks of
// the VM (package disks); the OCI hooks (package hooks); its streams, and the container itself in the guest (package guest).
// What a step made is taken back by the container's stack of undo steps.
//
// # Confidential pods
//
// A pod's platform (package tee) is chosen by configuration and never replaced by another. How its VM is launched is package
// vmplan's; Start goes through it: Probe before anything is made, the document, initdata's disk, the platform's Prepare, the
// VMM, and the comparison of the guest's Hello with what was asked. A confidential VM shares no files with the host: packages
// mounts and volumes give it copies and directories in its own memory, and refuse the rest with the reason. Nothing here
// protects the guest: these rules make errors that people can act on; the guest enforces its own.
//
// # States of a process
//
//	created --Start--> running
//	running --a fault of Start--> created
//	running --Pause--> paused
//	paused --Resume--> running
//	created, running, paused --exit, the end of the VM--> stopped
//
// Exits are final, and known, in the order in which the guest reports them; that an init's comes last is the business of
// who publishes it (shim/task). A process's output has been delivered before its exit is known. Delete forgets a process
// that is stopped, or that never was started.
//
// The tables in states.go have the same moves; one that is not there is an errdefs.ErrFailedPrecondition.
//
// # Locks
//
// Each controller has one mutex that guards its state and its tables of children; it is never held across an RPC, a call
// of the VMM or any I/O. Steps that must not overlap (two Starts) are kept apart by the state, which changes before the
// work begins. What NewPod fixed is read without a lock, and so is what Start made (running): Start publishes it together
// with the state, and nobody changes it afterwards.
//
// # Trust
//
// The guest is hostile to this side: what the agent answers is checked, bounded and translated, never forwarded. In
// the other direction this package keeps host paths, ids and devices out of what goes to the guest, but a
// confidential guest does not rely on that.
package virtcontainers
