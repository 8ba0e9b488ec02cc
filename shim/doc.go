// SPDX-License-Identifier: Apache-2.0

// Package shim is containerd's side of Cloister: the program containerd-shim-cloister-v2. It is containerd's contract
// and nothing else; what a pod is, package virtcontainers knows.
//
//	bootstrap  start, delete, -info
//	task       the Task service, versions 2 and 3
//	sandbox    the Sandbox service
//	events     the queue of events to containerd
//	stdio      relays between FIFOs and the guest's streams
//	pods       the one pod of the process, and its configuration from containerd's requests
//	criv1      CRI's PodSandboxConfig, as far as it is read
//	bundle     files in containerd's bundle directories
//
// Here is only what puts them together: Main, and the plugin by which containerd/pkg/shim finds the services.
//
// # How it ends
//
// ShutdownSandbox, or Shutdown when there is no task left, asks for the end once its answer is on its way; so do
// SIGTERM and SIGINT. Then a pod that still runs is stopped, the exits of its containers go out, the event queue is
// emptied, and the process exits.
//
// # Errors
//
// Inside, errors are errdefs kinds. The interceptor of the plugin is the one place where they become statuses.
package shim
