// SPDX-License-Identifier: Apache-2.0

// Package cloudhypervisor runs a hypervisor.Document as a Cloud Hypervisor process. It was never tried with a real one: what is
// sent follows Cloud Hypervisor's OpenAPI document and is shown by a server of the tests that takes nothing else.
//
// # From document to process
//
// The binary is asked for its version only: releases before v53 lose the end of a half-closed vsock stream and are refused.
// How it is run is a pure function of the document, with golden tests. Start hands over the listening API socket and the event
// monitor's pipe as open files, so that nothing is waited for, and sends vm.create and, for each NIC, vm.add-net with the tap's
// file in the same message; VM.Boot sends vm.boot. The console is the VMM's standard output, its log the standard error.
//
// Disks are virtio-blk devices on PCI segments of their own, found by serial; they and virtio-fs devices are hot-plugged by
// ACPI. The file of a removed disk is closed when the guest has let go of it, which nothing reports: the image is watched for
// closings, and then looked for among the VMM's files.
//
// # Sandbox
//
// With Document.Sandboxed the VMM runs under its own seccomp filters and landlock: it opens what vm.create names and what is
// shown to it later in a mount namespace of its own (mountNS), nothing else. A host without landlock is an error.
//
// # States of a VM
//
//	Start ─► created ─Boot─► running
//	            │               │
//	            └── VMM gone ───┴─► ended (Done closed, Exit valid)
//
// The VMM goes because the guest powered off, by Stop or Kill, or on its own. A guest that resets itself, as a panic makes it,
// would be started again: the event monitor's report of it is the VMM's end.
//
// # Goroutines and locks
//
// Those of package supervise; one reads the event monitor; one watches all of them and settles the VM's end; one per removal of
// a disk reads its image's closings. vm.mu guards what was reported and the disks' images, never over I/O.
//
// # Trust
//
// Host side. The guest is hostile, and the VMM may be the guest's: replies, reports and logs are bounded, and no path comes from
// it.
package cloudhypervisor
