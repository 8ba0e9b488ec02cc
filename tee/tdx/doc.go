// SPDX-License-Identifier: Apache-2.0

// Package tdx launches VMs as Intel TDX trust domains (TDs) with QEMU, and predicts what the hardware will report of them.
//
// A TD's quote carries five measured registers. They are of different certainty, and nothing here hides that:
//
//	MRTD    the firmware image as the VMM loads it. Two orders of loading are in use, so there are two values for one
//	        image: single-pass (KVM since Linux 6.16) and two-pass (older kernels with TDX patches).
//	RTMR0   the firmware's start: hand-off block, variables, ACPI tables, boot options. Depends on the firmware's build,
//	        QEMU's version and the whole machine. Given only where every event can be computed, else left out with the
//	        reason; never guessed.
//	RTMR1   the kernel image (as a PE file, Authenticode) and the boot's steps.
//	RTMR2   the kernel's parameters and the initrd, measured by the kernel's EFI stub (Linux 6.9 and later).
//	RTMR3   not extended before the workload runs: zero.
//
// beside the launch's own fields: MRCONFIGID (the initdata's digest), MROWNER, MROWNERCONFIG, ATTRIBUTES.
//
// Which events a firmware build has, and in what form, is read from the image itself (profile.go): builds of edk2 differ.
//
// What stands behind the values: MRTD in both variants, the hand-off block and all fixed events are compared with values
// that others published; RTMR0 to RTMR2 are replayed from the published logs of real TDs; the kernel's hash, parameters,
// initrd, variables, boot options and ACPI blobs are compared with what a real firmware and a real kernel measure into a
// software TPM under emulation (eventlog_test.go), where nothing is protected. This code never ran on a machine with TDX.
//
// Sources: Intel TDX Module Base Architecture Specification (348549) for MRTD and the quote's fields, Intel TDX Virtual
// Firmware Design Guide (344991) for the metadata, the hand-off block and the registers' use, TCG PC Client Platform
// Firmware Profile for events, Microsoft's PE/COFF and Authenticode documents for the kernel's hash.
//
// Host side, without locks or states: a Platform holds configuration only. Boot files and firmware belong to the host's
// owner and are not trusted to be well formed; every parser has limits and a fuzz test.
package tdx
