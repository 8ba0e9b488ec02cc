// SPDX-License-Identifier: Apache-2.0

// Package bundle names and handles the files that the shim keeps in containerd's bundle directories: the runtime options
// that `start` hands to the daemon, who the daemon is, and how a container or sandbox ended. `delete` works from them
// when no daemon is left.
//
// All files are written by atomic rename and read with a limit. A bundle belongs to root; its files are trusted as far
// as that. There is no state in memory and no lock.
package bundle
