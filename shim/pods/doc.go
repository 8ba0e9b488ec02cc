// SPDX-License-Identifier: Apache-2.0

// Package pods is what the task and the sandbox service share: the one pod of this process, and how a pod's
// configuration is made out of what containerd sends.
//
// # Whose the pod is
//
// A shim process serves one pod. Holder keeps it, with the way by which it was asked for:
//
//	none --Claim--> claimed --Set--> held
//	claimed, held --Release--> none
//
// With ModeSandbox the Sandbox service made it and only ShutdownSandbox ends the process. With ModePause it came with
// CRI's pause container, which is bookkeeping: its life is the pod's. With ModeSingle it came with the only container
// that it will ever have.
//
// # Interfaces
//
// Pod, Container and Process are what the services need of package virtcontainers; New adapts that package's types to
// them. Tests put others in their place.
//
// # Locks and trust
//
// Holder has one mutex, for its fields only. Specifications and sandbox configurations come from containerd, which is
// trusted, but a pod's author chose much of what is in them: annotations count only if the node's configuration lists
// them (package configs), and what cannot be had in a VM is refused by package virtcontainers.
package pods
