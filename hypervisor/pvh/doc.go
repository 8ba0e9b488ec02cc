// SPDX-License-Identifier: Apache-2.0

// Package pvh takes the uncompressed kernel (vmlinux) out of a bzImage, so that a VM boots it directly through its PVH
// entry point. The guest then does not decompress its kernel at each start: about 1.5 s of 4.6 s under emulation.
//
// The result is kept in a cache directory:
//
//	lock                 flock(2) held by whoever extracts
//	memo-<dev>-<ino>     JSON: what is known of one bzImage file, so that it is not read again while it is unchanged
//	vmlinux-<sha256>     the kernel taken out of the bzImage with that digest
//	.new-*               being written; without the lock held it is left over from a crash and removed by the next writer
//
// Every file appears by rename(2) after fsync(2), so a crash leaves nothing that looks complete. At most keepKernels
// kernels stay. Any number of processes may share the directory.
//
// The bzImage belongs to the host's owner and is trusted to boot a guest, but not to be well formed: sizes are bounded,
// offsets are checked, and the parsers have a fuzz test.
package pvh
