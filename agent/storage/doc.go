// SPDX-License-Identifier: Apache-2.0

// Package storage gives containers their root file systems and mounts, in the guest.
//
// # Where things are
//
// A Store owns one directory, a tmpfs of its own; every name below it is chosen here:
//
//	layers/N    read-only EROFS images, one for each disk, shared by all containers that name it
//	shares/N    virtio-fs devices, one for each tag, mounted until the guest ends
//	volumes/N   copied volumes, in the layout of the kubelet's AtomicWriter, see volumes.go
//	scratch/N   scratch volumes (emptyDir) in memory, a tmpfs each, until the guest ends
//	disk        the scratch disk, an ext4 file system that is made here, in a confidential guest over encryption: N, writable
//	            layers and the other scratch volumes, each with a project quota of its own, and trash, trees that are being
//	            deleted
//	shm         the pod's /dev/shm
//	c/N         a container: rootfs (overlayfs of its layers), rw (its writable layer, a tmpfs, if it is not on the scratch
//	            disk), file copies and binds of shared paths and of parts of scratch volumes
//
// The Store's tmpfs has shared propagation. A container that is being built holds copies of all mounts in its new mount
// namespace for a moment; unmounting here then unmounts there, else disks would stay in use. The mounts themselves are
// private, so that nothing that a container mounts comes back.
//
// # States
//
// A container is unknown, or has any of a root file system and prepared mounts. MountRootfs and PrepareMounts add to it
// once each and undo their own work if they fail; Remove takes everything back and forgets the container. An error of
// Remove leaves what is still there on record, so that it can be called again.
//
// A layer is being mounted, mounted, or being unmounted. The first container that asks mounts it, others wait for the
// outcome; the last one that goes unmounts it. A disk is released when no mounted layer uses it.
//
// The scratch disk's file system is made in the background when the pod is configured; what needs it waits.
//
// # Locks
//
// A volume has a turn, too (volume.turn): parts of generations are written, and files of it copied, one request at a time.
//
// Store.mu guards the tables and is never held over I/O, but for the unmount of a share's entry that nobody uses any more, which
// asks the kernel alone. Operations on one container take turns (container.turn);
// those on different containers run side by side.
//
// # Trust
//
// Requests and disks come from a hostile host. Disks are found by serial number alone, identifiers and options pass
// allow-lists, counts and sizes have limits. A shared directory's entry is opened without following links and bind mounted
// to a place of ours: no path of the host is ever resolved as a path. What an image of a file system holds is parsed by
// the guest's kernel: in a confidential guest, too, layers are taken as the host gives them, until images are verified below
// the file system (dm-verity). The scratch disk is not: nothing that was on it before is read, and a confidential guest
// encrypts it, see scratchcrypt.go. Only initdata's disk is held against something that the launch bound (package launch).
//
// Volumes are files that the host sends. Their names are checked (manifest.go) and resolved below a directory of ours without
// following links; containers see them read-only. In a confidential guest live directories of the host are refused.
package storage
