// SPDX-License-Identifier: Apache-2.0

// Package report asks, in the guest, the hardware what it launched: which platform this is, and the field that the host
// bound to the launch (HOST_DATA on SEV-SNP, MRCONFIGID on TDX).
//
// # Where the bytes come from
//
// On SEV-SNP the kernel's sev-guest driver gets the report from the secure processor over a channel that is encrypted and
// authenticated with a key of the launch; it is read through configfs-tsm (Linux, Documentation/ABI/testing/configfs-tsm).
//
// On TDX configfs-tsm gives a quote. A quote comes from a service on the host, through memory that the host can write: its
// fields say nothing until its signature is verified, and a guest without a quoting service gets none. So this package
// takes the TDREPORT, which the TDX module writes into the guest's private memory (TDG.MR.REPORT), through the ioctl of
// Linux' Documentation/virt/coco/tdx-guest.rst.
//
// On s390x there is no such field: what is bound is part of the sealed image (its kernel command line), and the kernel says
// whether the image runs protected.
//
// # Trust
//
// Nothing here verifies a signature: that is what a remote verifier is for, and a guest that a host made up entirely can be
// told anything. What is checked keeps a real guest of a real platform from running with another document than its own.
// Sizes, versions and the echo of a fresh nonce are checked strictly; nothing here falls back to a weaker source.
package report
