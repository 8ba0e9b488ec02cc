// SPDX-License-Identifier: Apache-2.0

// Package erofsimg writes a directory tree as an uncompressed EROFS image and recognises EROFS images.
//
// It writes the on-disk format of Linux (fs/erofs/erofs_fs.h, since 5.15) itself because no other writer keeps everything a
// root filesystem needs: github.com/erofs/go-erofs 0.3 gives every hard link an inode of its own, loses POSIX ACLs, expands
// holes and holds all files of a source open at once; mkfs.erofs is not there on most hosts. What is kept: owner and group
// (32 bits), all mode bits, modification times in nanoseconds, extended attributes and ACLs, hard links as one inode, device
// nodes, pipes, sockets, symbolic links, holes of sparse files, files and directories of any size.
//
// Build walks the tree twice. The first walk collects metadata, from which the whole layout follows; the second one copies
// contents to their places. So memory grows with the number of files, not with their sizes, the output is written once, its
// size is known before the first byte, and the same tree gives the same image, bit by bit.
//
// Trust: the tree is the host's (a snapshotter's directory, nobody writes to it), but its contents are an image author's. No
// symbolic link is followed and no mount point crossed; every count and size has a limit. The package has no state and no locks.
package erofsimg
