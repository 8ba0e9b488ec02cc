// SPDX-License-Identifier: Apache-2.0

// Package volumes brings a pod's volumes to a confidential guest, which shares no directory with the host.
//
// Parse tells from a path what the kubelet, or containerd, keeps there: a ConfigMap or Secret (also projected and
// downward-API volumes), an emptyDir, a part of one of them, a termination log. Read takes a snapshot of a volume that
// is copied, as the kubelet wrote it and never half of an update. Set pushes snapshots to the guest and pushes again
// when the kubelet has changed the volume.
//
// # The kubelet's layout
//
// ConfigMaps, Secrets, projected and downward-API volumes are written by the kubelet's AtomicWriter
// (k8s.io/kubernetes/pkg/volume/util/atomic_writer.go):
//
//	<volume>/..2026_01_02_03_04_05.123456789/key     the files
//	<volume>/..data -> ..2026_01_02_03_04_05.123456789
//	<volume>/key -> ..data/key
//
// An update makes a new directory, replaces ..data by a rename, and removes the old directory. So a snapshot reads ..data, the
// files, and ..data again; the rename is what a watch waits for.
//
// # Locks
//
// Set has one mutex for its fields. Each volume has a turn (a channel of one element) that is held while it is read and
// pushed, so that generations arrive in order; no other lock is held meanwhile.
//
// # Trust
//
// The volumes' directories are the kubelet's; what is in them came from outside the node. Nothing in them is followed: no
// symbolic link but ..data, no mount, and only regular files are read, within the limits of package wire. The guest gets
// names and bytes and decides where they go.
package volumes
