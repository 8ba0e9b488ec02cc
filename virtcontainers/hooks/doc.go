// SPDX-License-Identifier: Apache-2.0

// Package hooks runs the OCI hooks of a container on the host.
//
// runtime-spec (config.md, "POSIX-platform Hooks") knows six points. Three of them, and the older prestart, belong to
// the runtime's own namespaces, which are the shim's:
//
//	prestart, createRuntime   CreateRuntime   before create is answered; a failure fails the create
//	poststart                 Poststart       after start; failures are logged
//	poststop                  Poststop        after delete; failures are logged, all hooks run
//
// The other two, createContainer and startContainer, are refused by Validate: their programs are files of the host, to
// be run within the container, which is in another machine. Design rule 1: no path of the host is followed in the guest.
//
// A hook gets the container's state as JSON on standard input. Its pid must be one whose /proc/<pid>/ns/net is the
// container's network namespace as the host sees it (network.Namespace.TID, or a process of the VMM); that is what
// nerdctl and CNI hooks look at.
//
// # Processes
//
// Each hook is a process group of its own. At its time limit, or when the context ends, the group is killed and reaped.
// What a hook leaves behind on purpose, a daemon say, is not touched after the hook ended by itself. Hooks of
// CreateRuntime and Poststart are killed with the shim; those of Poststop are not, since they tidy up.
//
// The caller must not reap children with wait4(-1): it would take the hooks' exit statuses away.
//
// # Locks and trust
//
// No state, no locks. Hooks come from the OCI spec and are as trusted as containerd: they are programs that root runs on
// the host. Nothing from the guest may ever get into them but the container's exit.
package hooks
