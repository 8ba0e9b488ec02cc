// SPDX-License-Identifier: Apache-2.0

// Package ocispec is the allow-list that stands between the OCI specification that containerd wrote for the host and the
// guest: what the guest gets is put together anew from what is named here. Everything else is meaningless in a VM, made
// anew there, or the host's own (paths, devices, cgroups, security modules, CPU numbers); what cannot be honoured is
// refused, with the reason. Mounts and the root filesystem go to the guest by other ways (packages mounts and disks).
//
// All functions are pure and leave the caller's specification as it is.
//
// # Trust
//
// Specifications come from containerd. The list keeps the host's names out of the guest; a confidential guest does not
// rely on it and has rules of its own.
package ocispec
