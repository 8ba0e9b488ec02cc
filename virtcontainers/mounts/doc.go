// SPDX-License-Identifier: Apache-2.0

// Package mounts says what becomes of a container's mounts in its VM, and makes it so. It goes in three steps:
//
//   - Plan (Classify, for one mount) gives every mount one Kind, from the words of the specification and the VM's Sharing
//     alone. It touches nothing, so that a pod can be planned where it does not run.
//   - Look asks the host's files what the words do not tell: whether the source is a device or a socket, which volume a
//     part was taken from, whether a volume of the image is empty. What it finds in the way becomes Refused.
//   - Set.Attach makes the agent's mounts of them, each Kind in one place: files are copied, volumes sent to the guest,
//     directories of the host shared over virtio-fs.
//
// Refusals between the second and the third step lists everything that cannot be had, before anything is made.
//
// # What becomes of a mount
//
//	GuestFilesystem  proc, sysfs, tmpfs and so on: of the guest's kernel
//	PodShm           /dev/shm: the pod's, in the guest
//	CgroupView       /sys/fs/cgroup: the guest's
//	PodFile          /etc/hosts, /etc/hostname, /etc/resolv.conf: copied, or written by this package
//	Live             any other file or directory of the host, in a VM that shares them: virtio-fs (package share)
//	Copied           ConfigMap, Secret, projected and downward-API volumes, in a VM that does not: package volumes
//	Part             a part of such a volume (subPath): copied once
//	Scratch          an emptyDir: made by the guest, on the scratch disk or in its memory
//	TerminationLog   a file of the guest's own
//	ImageVolume      a VOLUME of the image: the image's files, or an empty directory of the guest's
//	Refused          cannot be had; the zero value
//
// # Locks
//
// A Set has one turn (a channel of one element), held while virtiofsd is started and plugged in, once a pod. All methods
// may be called at the same time, but for Close, which comes after all other calls have returned.
//
// # Trust
//
// Specifications and what they name come from containerd and the kubelet; contents of volumes from outside the node (see
// package volumes). No path of the host goes to the guest. A confidential guest has rules of its own and does not rely
// on the refusals here: they give an error that people can act on, before anything is made.
package mounts
