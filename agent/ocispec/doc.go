// SPDX-License-Identifier: Apache-2.0

// Package ocispec is the guest's allow-list of OCI specifications: what of a container, a process or a set of limits
// that the host asks for reaches libcontainer.
//
// It copies field by field what the guest means to do, refuses what would change the container's meaning or reach into
// the guest, and drops what only describes the host: cgroup paths, labels, numbers of devices, CPU lists beyond the
// guest's. A field that this package does not name does not get through.
//
// # Use
//
// Bytes are decoded first (DecodeContainer, DecodeProcess, DecodeResources), within a limit of size. A Guest then turns
// the decoded value into one that may be run (Guest.Container, Guest.Process, Guest.Resources), and libcontainer's forms
// are made from checked values only (LibcontainerProcess, DeviceRules, MergeResources). The caller fills in root and
// mounts from the guest's own storage.
//
// # Trust
//
// The host is hostile: every field of a specification is an input to be refused. A Guest is read from the running kernel
// and from the agent's own state, never from a request. Nothing here opens a path that a request names.
//
// # States and locks
//
// There are none. A Guest is constant once the caller has filled it in, and may be used by several goroutines.
package ocispec
