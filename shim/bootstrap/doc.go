// SPDX-License-Identifier: Apache-2.0

// Package bootstrap is how containerd starts a shim, asks what it can do, and cleans up after it.
//
// # Dialects of `start`
//
// containerd 2.3 and later write a BootstrapParams message to stdin and read a BootstrapResult from stdout. containerd
// 2.0 to 2.2 write the runtime options or nothing, and read JSON. containerd 1.x writes the same, and refuses JSON that
// speaks of version 3: it gets the bare address, which stands for version 2. containerd/pkg/shim knows only the first
// dialect (containerd#13763), so `start` is done here and everything else there.
//
// A message is BootstrapParams only if it names the instance and namespace of the command line: options can decode as
// one. 1.x and 2.0 to 2.2 are invoked alike; what the caller's binary (-publish-binary) was built from tells them apart.
//
// containerd reads stdout and stderr of `start` together: nothing but the answer may be written.
//
// # What `start` does
//
// It finds the socket's address from the caller's address, namespace and the id of the pod (an annotation in the
// bundle's config.json, which a sandbox need not have). If a shim answers there, that shim's address and version are
// the answer. Else the daemon is started with the listening socket as fd 3, in a process group of its own, and with the
// runtime options in a file of the bundle.
//
// # What `delete` does
//
// It needs no daemon: it ends one that is still there, has package virtcontainers clean up from disk state, and tells
// the exit that the daemon kept in the bundle, 137 if it kept none. It can be repeated.
//
// The package has no state and trusts its caller, root's containerd; input is bounded and checked nevertheless.
package bootstrap
