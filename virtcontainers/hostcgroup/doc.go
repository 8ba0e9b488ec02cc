// SPDX-License-Identifier: Apache-2.0

// Package hostcgroup makes the cgroup on the host that holds a pod's VMM and its helpers (QEMU, virtiofsd).
//
// The pod's limits are enforced twice: in the guest, by its own cgroups, and on the host, by what kubelet or the user
// set on the parent of this cgroup. This package sets no limits. It only puts the processes where they belong, so that
// the pod pays for its VMM, and tells what they use.
//
// # Which path
//
// Path translates what the caller of a runtime gives: an OCI cgroupsPath ("/default/x", or "slice:prefix:name" of the
// systemd driver) or, with Parent, a CRI cgroup_parent. Systemd's form becomes the path that systemd would use; the
// cgroup is made in cgroupfs and not as a scope unit by D-Bus. That is a leaf below a slice of kubelet's; systemd leaves
// it alone as long as the slice exists.
//
// # Version 1, version 2, both
//
// The mount table tells which hierarchies there are. On a unified host it is one. On a legacy or hybrid host the cgroup
// is made and joined in every mounted hierarchy. A hierarchy that may not be written (no permission, read-only mount, as
// in containers) is left out with a message at debug level; only if none is left, that is an error.
//
// # Life
//
//	Create ──▶ AddProcess* ──▶ Delete     DeleteByPath does the same from a path alone, after a SIGKILL of the shim
//
// Delete kills nobody: it waits, bounded by its context, until the processes have ended. It is safe to repeat. Parents
// that did not exist are made and marked with the extended attribute trusted.cloister; Delete removes marked parents
// with the last of their children, and no others. The trusted class of attributes needs CAP_SYS_ADMIN and works on
// version 1 and 2 alike; where it fails, the parents stay.
//
// # Locks and trust
//
// A Group is immutable and safe for use by many goroutines. Paths come from containerd, which is trusted on the host;
// they are checked all the same, since they become names of directories. Nothing here comes from the guest.
package hostcgroup
