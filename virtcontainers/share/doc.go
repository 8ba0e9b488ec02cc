// SPDX-License-Identifier: Apache-2.0

// Package share gives live directories and files of the host to a plain VM, over virtio-fs. It is not for confidential guests: what it
// serves is the host's.
//
// One virtiofsd serves all shares of a pod as one filesystem. Its root holds a directory or file with a random name for each, on
// which the host's directory is mounted. That root exists in mount namespaces of its own only:
//
//   - one that a thread of this process has. It begins as a copy of the host's, gets a small tmpfs with the served root in it, and
//     then drops the host's tree (pivot_root). Shares are attached and detached there, by that thread.
//   - virtiofsd's, which starts as a copy of it, and in which virtiofsd itself pivots to the served root (sandbox=namespace) before
//     it reads anything from the guest. Attached shares reach it because the served root is a shared mount.
//
// So virtiofsd can reach what is shared and nothing else, whatever the guest makes of it, and no mount outlives the processes:
// virtiofsd is the first process of a PID namespace and dies with the thread (PDEATHSIG), thus with this process, however that ends.
// The served root itself is read-only.
//
// A share is a copy of the host's mounts at a path (open_tree), with all that is mounted below. What the host mounts or unmounts
// below it later does not show: a guest keeps open what it has seen, so that the host could not unmount what it mounted. Unmounting
// a shared directory on the host works at once; its filesystem stays busy until Remove, and until the guest has let go of open files.
//
// # One object of the host is one in the guest
//
// The guest tells objects apart by the mount in which virtiofsd finds them. So what is asked for a second time, under whatever path,
// or lies in what is shared already, is found there: by the file system and the path in it, or by the path on the host, and looked up
// to be sure. What contains something that was shared before it is told with it, for the guest to mount the one in the other. What was
// shared read-only becomes writable when it is asked for so, and stays so; a guest that is given more than was asked for withholds
// the rest. Two objects remain: what has other mounts in it than when it was shared first; what was shared recursively read-only with
// mounts in it, and is then to be written; and a part that is to be written of what was only to be read, since the guest must not get
// at all of it for that.
//
// Nothing is cached in the guest beyond what it revalidates on each use: changes on either side show at once on the other. Only
// pages that the guest has mapped to memory can be behind, and (with the program in C) a file that the guest keeps open while the
// host overwrites it twice within one tick of its clock with as many bytes. POSIX and BSD locks work among the guest's
// processes, not across.
//
// # Locks and goroutines
//
// The table of shares is used on the namespace's thread alone. Three goroutines belong to a Share and end with Close: the one
// locked to the thread of the namespace, one that waits for virtiofsd, one that reads what it logs.
//
// # Trust
//
// Paths come from containerd and are followed as the host would follow them. virtiofsd is exposed to the guest; nothing it says is
// interpreted, only logged, with a bound.
package share
