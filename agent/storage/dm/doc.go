// SPDX-License-Identifier: Apache-2.0

// Package dm makes devices of the kernel's device mapper, with the ioctls of linux/dm-ioctl.h: the guest has no dmsetup or
// cryptsetup that the agent could run. It knows no target; what a table means is its caller's.
//
// # States
//
// A device does not exist, or is active with one table: Create makes it, loads the table and resumes it, or leaves nothing.
// The device's node is made by the kernel (devtmpfs) before Create returns. Remove ends it.
//
// # Locks, trust
//
// There is no state here, and no lock: names are the kernel's, which refuses one that is taken. Tables may hold keys. The
// kernel is told to wipe its copies (DM_SECURE_DATA_FLAG), the buffers here are wiped, and errors never show a table. Who has
// /dev/mapper/control can read the keys of active devices; containers have no such device.
package dm
