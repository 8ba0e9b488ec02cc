// SPDX-License-Identifier: Apache-2.0

// Package snp launches VMs under AMD SEV-SNP: it probes a host, adds itself to a VM's document, predicts the launch digest,
// and signs the identity of a launch.
//
// # What is measured
//
// The launch digest (digest.go) covers the firmware image, the memory that the firmware's SNP metadata names, and the
// initial state of each virtual CPU (vmsa.go), which holds the signature of the CPU model. One page of that memory is
// filled by QEMU (kernel-hashes=on) with the SHA-256 of kernel, initrd and command line (hashtable.go), so that these are
// covered too, if the firmware checks what it loads against the table. Only builds with edk2's BlobVerifierLibSevHashes do
// (OvmfPkg/AmdSev). An ordinary OVMF has the same page, measured in the same way, and boots any kernel; nothing in an image
// tells the two apart. Therefore the firmware is accepted by its digest alone (Config.Digests).
//
// Cloud Hypervisor launches an IGVM file instead (package igvm, igvmlaunch.go): its pages in the order of their addresses, with
// the same hash table, and the states of its CPUs as KVM changes them.
//
// From a firmware image, the digest of n CPUs is that of n-1 CPUs with one more page, so that a range of counts costs little
// more than one.
//
// # From document to launch
//
//	New (all settings checked) ─► Probe (host) ─► Prepare (document) ─► Measure (reference values)
//
// Prepare and Measure compute the same digest by the same code; with an ID key Prepare signs it into the ID block, and the
// firmware of the CPU then refuses another launch. Signatures are deterministic (RFC 6979), so a document prepared twice is
// the same twice.
//
// # Trust
//
// Host side. Nothing that this package checks protects a guest from its host; the hardware's report does, when somebody
// compares it with the reference values. The checks here keep an honest operator from starting what a verifier refuses, or
// worse, accepts although it is weak. Files can change between Prepare and the launch: then the measurement differs.
//
// Sources: SEV Secure Nested Paging Firmware ABI Specification (AMD 56860), sections named in the code; AMD64 Architecture
// Programmer's Manual volume 2 (24593), appendix B; QEMU's docs/system/i386/amd-memory-encryption.
package snp
