// SPDX-License-Identifier: Apache-2.0

// Package rootfs turns the mounts that containerd sends for a container's root filesystem into read-only block images for a
// guest.
//
// Two kinds of mounts are understood:
//
//   - Directories of the overlayfs snapshotter: an overlay mount or, without layers, a bind mount. All lower directories become
//     one EROFS image in a Cache, written once and shared by all pods. What an overlay of them shows is left to the kernel: the
//     builder mounts it read-only in a mount namespace of its own, on a thread that ends with the build, so that nothing can be
//     left behind, and walks that. An upper directory in which somebody wrote before the start becomes one more layer that
//     belongs to this container only.
//   - Layers of the erofs snapshotter, which are images already: one Layer each, in the order of the overlay.
//
// The writable layer is the guest's own; upper and work directories of the host are read, if at all, and never made or written.
// Anything else is refused with errdefs.ErrInvalidArgument or errdefs.ErrNotImplemented. An image is handed on because its mount
// said so or because this package wrote it, never because a file looks like one.
//
// # The cache
//
// The directory holds, for each key, "<key>.img", "<key>.lock" and, during a build, "<key>.tmp"; and "fresh-<random>.img" for
// images that are not shared. Many processes use it at a time:
//
//   - <key>.lock is held exclusively (flock) by the one that builds or evicts; it alone touches <key>.tmp, renames it or removes
//     <key>.img. Whoever comes next waits for it.
//   - a user keeps a shared flock on the open image. Eviction needs that lock exclusively and does not wait for it, so an image in
//     use stays.
//   - all locks end with their process; a .tmp whose .lock is free, or an unlocked fresh image, is a dead builder's and is swept.
//
// The key names the chain of directories by what does not change while they exist: filesystem, inode, times of birth and change,
// and path of each, plus the options that decide about the merge. Snapshotters never change a committed directory. Damaged images
// (size, superblock checksum, UUID made from the key) are built anew. Within a process, callers for the same key share one build,
// which goes on as long as one of them waits.
//
// # Locks
//
// Cache.mu guards the table of builds and is never held over I/O.
//
// # Trust
//
// Mounts come from containerd, which is trusted as far as the host goes; contents are an image author's (see package erofsimg).
package rootfs
