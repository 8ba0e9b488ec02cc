// SPDX-License-Identifier: Apache-2.0

// Package qemu runs a hypervisor.Document as a QEMU process.
//
// # From document to process
//
// The Driver finds the binary and probes what it can do when that is first needed (Features, cached on disk by the binary's
// identity; never by its version). The command line is a pure function of Document and Features, with golden tests. Start
// checks the document, opens what it names and starts QEMU with the virtual CPUs stopped; VM.Boot lets them run. In
// between, the caller binds its vsock listeners and adds disks, so nothing of the guest's first words is missed.
//
// # Machines
//
//	amd64  q35; devices on PCI; an ELF kernel starts by PVH, with firmware a bzImage by the firmware
//	s390x  s390-ccw-virtio; devices on the channel subsystem; a raw kernel, or a sealed image that holds everything
//
// Both are given as the concrete type behind these names, so that a guest and what is measured of it change only with
// QEMU. Disks are on virtio-scsi in both, where they come and go without a PCI slot each. The embedded vsock device
// exists for PCI only; on s390x it is behind zPCI.
//
// # Confidential VMs
//
// Document.Confidential adds the platform's object (sev-snp-guest, tdx-guest, s390-pv-guest), always as JSON and with
// every value that the document has: a property that the binary's QMP schema does not list is a *Missing that names it.
// Every virtio device follows the guest's DMA rules (iommu_platform) and has the modern
// interface only; the one exception, the embedded vsock device on s390x, is out of reach of any platform with hardware.
// The platform sample is the same without an object: nothing protects it.
//
// What such a guest says of its own end (TDX's fatal error, SEV's termination request) is in Exit.Detail.
//
// # States of a VM
//
//	Start ─► prepared ─Boot─► running
//	             │               │
//	             └── QEMU gone ──┴─► ended (Done closed, Exit valid)
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
// vm.mu guards what the events said and who waits for one. It is never held over a QMP command or other I/O.
//
// # Trust
//
// Host side. The guest is hostile, and QEMU may have been taken over by it: QEMU gets no file but those it needs, runs
// under its own seccomp filter, and what it or the guest writes is bounded and stripped of control characters.
package qemu
