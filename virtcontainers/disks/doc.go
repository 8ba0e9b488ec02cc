// SPDX-License-Identifier: Apache-2.0

// Package disks plugs the layers of root filesystems into a VM as read-only disks that the guest finds by their serial
// numbers. Containers of a pod that need the same image share one disk.
//
// # States of a disk
//
//	attaching --AddDisk--> plugged --last Detach--> gone
//	attaching --AddDisk fails--> gone
//
// Whoever asks for an image that is on its way waits for it, and gets its fault. A serial number is not used twice in a VM:
// the guest may still know the old disk.
//
// # Locks
//
// Set.mu guards the table and the counts of users; it is never held over a call of the VMM. All methods may be called at
// the same time.
//
// # Trust
//
// Paths and keys come from package rootfs. The guest gets serial numbers, no paths of the host.
package disks
