// SPDX-License-Identifier: Apache-2.0

// Package agent is the guest's side of Cloister: PID 1 of the micro-VM, inside the trust boundary. It has no code of its
// own; its rooms are
//
//	boot       brings the guest up and takes it down
//	network    addresses, routes and neighbours of the pod
//	storage    disks, layers, overlays, virtio-fs and copied files
//	container  containers and processes, with libcontainer
//	server     the agent protocol, which the host speaks with it
//
// They import agent-protocol and nothing else of this repository. Among themselves only server imports container; the
// rest meets in cmd/cloister-agent.
package agent
