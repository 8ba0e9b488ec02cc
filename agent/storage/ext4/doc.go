// SPDX-License-Identifier: Apache-2.0

// Package ext4 makes an ext4 file system on a block device, as mke2fs does: the agent has no other programs in the guest
// that it could run. It is for scratch disks, which are made when a pod starts and thrown away when it ends; the file
// system is made to be there fast and for little written, not to be kept.
//
// # Format
//
// Names and meanings are those of the kernel's Documentation/filesystems/ext4; the quota file's are those of its
// fs/quota/quotaio_v2.h. Blocks have 4096 bytes, inodes 256, groups 32768 blocks; all metadata has checksums
// (metadata_csum). There is no journal: after the guest ends, nobody reads the disk. Nothing is reserved for root (the
// kernel keeps a fiftieth, at most 16 MiB, for itself), and there is no room to grow into. Block numbers have 32 bits (no
// 64bit feature), which is enough for 16 TiB.
//
// # Layout
//
// flex_bg allows a group's bitmaps and inode table to be anywhere, and here those of all groups are at the start of the
// disk, like mke2fs -E packed_meta_blocks has them:
//
//	superblock, descriptors of all groups     copies of both in groups 1 and 3ⁿ, 5ⁿ, 7ⁿ (sparse_super)
//	block bitmaps of all groups
//	inode bitmaps of all groups
//	inode tables of all groups
//	root directory, lost+found, quota file
//
// So nearly all groups are empty and are only declared: a group without a block in use has no block bitmap (BLOCK_UNINIT),
// one without an inode has no inode bitmap and no inode table (INODE_UNINIT), and the kernel makes up what they hold until
// it changes. Behind the metadata all that is free is contiguous, but for the copies of the superblock.
//
// # Quota
//
// With project quota the file system has one hidden inode, the quota file of projects, as the first one after lost+found.
// It is a radix tree with one leaf, the usage of project 0, that is of the root directory and lost+found. To mount that
// read-write the kernel needs its modules quota_tree and quota_v2: without it fails with ESRCH, or EINVAL if the kernel was
// built without them. It then keeps account of each project's space and inodes, and enforces limits if the mount's options
// have prjquota, but for processes with CAP_SYS_RESOURCE.
//
// # States, locks, trust
//
// Format keeps nothing. It only writes, and reads no byte of the device: what a hostile host has put there matters only if
// Options.Zeroed says wrongly that there is nothing. The primary superblock is written last, so that a device on which
// Format failed is not taken for a whole file system, unless there was one before.
package ext4
