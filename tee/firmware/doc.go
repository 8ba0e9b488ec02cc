// SPDX-License-Identifier: Apache-2.0

// Package firmware reads OVMF images: what they tell a launcher about themselves, where they are found on a host, and their
// digest.
//
// # The table
//
// OVMF leaves a table of entries with GUIDs at the end of its image, read backwards from a footer 32 bytes before the end
// (the last 32 bytes are the reset vector). Parse reads of it what measured launches need: the place of the kernel hash
// table, the entry point of further virtual CPUs, the SNP metadata and the TDX metadata. It is strict: an image whose
// table contradicts itself is refused as a whole, because a VMM that reads it in another way would measure something else.
// Entries that are not known are kept and mean nothing.
//
// # Discovery
//
// Find goes by QEMU's firmware descriptors (docs/interop/firmware.json of QEMU), the files by which distributions say what
// a firmware image is good for.
//
// # Trust
//
// Host side. A firmware image and a descriptor are files of the host, and what they say of themselves proves nothing: an
// image with a place for kernel hashes may not check them at all. What is accepted is decided by digest, by the platforms.
package firmware
