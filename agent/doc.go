// SPDX-License-Identifier: Apache-2.0

// Package agent is the guest's side of Cloister: PID 1 of the micro-VM, inside the trust boundary. It has no code of its
// own; its packages are
//
//	boot       brings the guest up and takes it down
//	launch     how the guest was launched, and whether that holds
//	network    addresses, routes and neighbours of the pod
//	storage    disks, layers, overlays, virtio-fs and copied files
//	ocispec    the allow-list of what an OCI specification may ask of the guest
//	container  containers and processes, with libcontainer
//	server     the agent protocol, which the host speaks with it
//
// Of this repository they import agent-protocol, and launch besides it tee/initdata and tee/report, which read what a
// launch is bound to and the hardware's evidence of it. Among themselves boot imports launch, container imports ocispec
// and server imports container; the rest meets in cmd/cloister-agent.
package agent
