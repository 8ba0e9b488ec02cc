// SPDX-License-Identifier: Apache-2.0

// Package image makes, shows, checks and opens the boot images of IBM Secure Execution for Linux.
//
// An image is a file whose offsets are load addresses, all numbers big-endian:
//
//	0x0       short PSW: where a machine starts, stage3a's code
//	0xc000    this layout's own mark "SeImgLnx" with the places of header and IPIB
//	0x10000   stage3a, in clear: asks the ultravisor to unpack what follows and to start it
//	0x14000   the Secure Execution header (after stage3a, never lower)
//	...       the components, page by page AES-256-XTS: kernel, initrd, command line, stage3b
//	...       the IPIB: the list of components that stage3a hands over
//
// The header holds digests of the encrypted pages (PLD), their addresses (ALD) and tweaks (TLD), the keys encrypted, and a
// key slot for each machine that may run the image. Its AES-GCM tag covers all of it, so that the tag names the image.
// stage3b runs inside: it moves kernel and command line to their places and starts the kernel.
//
// Build is for the owner of a workload. Inspect needs no key and sees what the host sees. Open does what the ultravisor
// does, with a host's private key, and Unpacked.WriteFlat gives what then is in the guest's memory: with a key of one's
// own an image can be tried from its first instruction on without the hardware. That protects nothing.
//
// Source: IBM, "Introducing IBM Secure Execution for Linux" (SC34-7721), and the layout that s390-tools' pvimg writes.
// Images are hostile input: all sizes and places are checked against the file before use.
package image
