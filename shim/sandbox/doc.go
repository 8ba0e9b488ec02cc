// SPDX-License-Identifier: Apache-2.0

// Package sandbox is containerd's Sandbox service, version 1: pods made with sandboxer = "shim".
//
// # States
//
//	none --CreateSandbox--> created --StartSandbox--> ready --StopSandbox, VM lost--> stopped
//	created --StartSandbox fails, StopSandbox--> stopped
//	any --ShutdownSandbox--> the process ends
//
// CreateSandbox only checks: a configuration that cannot be served is refused there. A StartSandbox that fails leaves
// nothing but the process, which containerd ends with ShutdownSandbox.
//
// The service holds no lock while it works: the pod itself orders overlapping calls, and the pod's Holder lets one
// CreateSandbox through. Requests come from containerd, which is trusted; what is in them is checked where it is used.
package sandbox
