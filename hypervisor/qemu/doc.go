// SPDX-License-Identifier: Apache-2.0

// Package qemu runs a hypervisor.Document as a QEMU process.
//
// # From document to process
//
// New finds the binary and probes what it can do (Features, cached on disk by the binary's identity; never by its
// version). CommandLine is a pure function of Document and Features, with golden tests. Start checks the document,
// opens what it names and starts QEMU with the virtual CPUs stopped; VM.Boot lets them run. In between, the caller
// binds its vsock listeners and adds disks, so nothing of the guest's first words is missed.
//
// # States of a VM
//
//	Start ─► prepared ─Boot─► running ◄─Pause/Resume─► paused
//	             │               │                       │
//	             └───────────────┴── QEMU gone ──────────┴─► ended (Done closed, Exit valid)
//
// QEMU goes because the guest powered off, panicked or reset (there is no reboot), by Stop or Kill, or on its own. The
// reason is taken from QMP's SHUTDOWN and GUEST_PANICKED events, then from the process's exit status. No pvpanic device
// is given to the guest: with the kernel parameter panic=-1 a panic resets the machine, which -no-reboot turns into an
// end, and the console has the panic's message; that needs no module in the guest.
//
// # Goroutines and threads
//
// One goroutine owns the process. It is locked to a thread of its own that enters the pod's network namespace, starts
// QEMU, and lives until QEMU is reaped: the parent-death signal follows the parent's thread, not its process. Two
// goroutines copy QEMU's stderr and the console into bounded logs, two are the QMP client's, one watches all of them
// and settles the VM's end. All are gone when Done is closed.
//
// # Locks
//
// vm.mu guards the tables of disks, ports and waiters. It is never held over a QMP command or other I/O.
//
// # Trust
//
// Host side. The guest is hostile, and QEMU may have been taken over by it: QEMU gets no file but those it needs, runs
// under its own seccomp filter, and what it or the guest writes is bounded and stripped of control characters.
package qemu
