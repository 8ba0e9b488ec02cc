// SPDX-License-Identifier: Apache-2.0

// Package container runs the pod's containers and their processes with libcontainer, in this very binary: a container's
// process starts as a copy of the agent (MaybeInit), which becomes the container's command.
//
// # States of a container
//
//	creating ──► created ──► running ◄──► paused
//	    │            │          │            │
//	    ▼            └──────────┼────────────┘
//	 (gone)                     ▼ the init has been reaped
//	                         stopped ──► deleting ──► (gone)
//	                            ▲            │ an error: delete can be repeated
//	                            └────────────┘
//
// In creating the id is taken, and nothing else is known of the container to others. In created the init process exists,
// and waits at libcontainer's exec fifo; whatever can go wrong, a command that does not exist for example, has gone wrong
// before. In stopped the cgroup is still there, for statistics and the count of OOM kills.
//
// # States of a process
//
//	created ──► starting ──► running ──► exited
//	    └──────────┴────────────────────────▲ could not be started, or was deleted before
//
// An init is starting from CreateContainer on. A further process (exec) is only recorded until it is started. Between
// the death of the kernel's process (reaped, after which signals give NotFound) and exited its output is drained.
//
// # Exits
//
// No process of a container outlives its init: with a pid namespace of its own the kernel kills the others, in one that is
// shared the agent kills the container's cgroup. In which order their exits are then recorded is left open; who tells
// containerd puts them in order, and does not rely on a guest for it (shim/task). Before any exit is recorded, OOM kills
// are counted and reported (NextEvents, and oom_kills of the exit itself).
//
// # Standard streams
//
// Streams holds the host's connections until a process asks for them. EOF is in band both ways: a stream that the host
// half-closes closes the process's stdin, a pipe's end half-closes the stream. A terminal gets no EOF, see input. An exit
// is reported when what the process wrote has been read (output), or when the host has taken nothing for 10 seconds.
// Children in the background keep a stream open, but not the exit.
//
// # Namespaces
//
// Every container is in the guest's network namespace, which is the pod's, and has mount and cgroup namespaces of its
// own. IPC, UTS and pid are its own or the pod's. The pod's are kept by open files: IPC and UTS from ConfigurePod on, pid from
// the first container on that asks for it, with a pause process without rights in an empty root as its init. A container may
// join another one's pid namespace instead (pid_target), which nothing keeps open: when the other's init ends, the kernel kills
// all in it. Containers with the same map share a user namespace, which is made for the first of them (users.go); the kernel
// mounts /proc only for the user namespace that a pid namespace belongs to. The network is the guest's, so that capabilities of a
// user namespace mean nothing to it.
//
// # Trust
//
// The host is hostile: requests go through an allow-list (package agent/ocispec) that copies field by field what the
// guest means to do, refuses what it will not do, and drops what describes the host. The container's processes are
// hostile too: the agent's executable is sealed before it runs in a container (libcontainer's exeseal), and the agent
// reads nothing from a container but its pipes, its terminal and its cgroup files.
//
// # Locks
//
//   - Manager.mu: the map of containers and the pod. Never held over a system call.
//   - pod.turn: making the namespaces that containers share; held over the start of a process, waited for with a context.
//   - container.lane: one operation at a time that changes a container (create, start, pause, update, delete); held over
//     libcontainer's slow calls, waited for with a context. Signals, waits, resizes, statistics and execs do not take it.
//   - container.mu: the states of a container and its processes. Never held over a system call.
//   - container.oomMu: reading memory.events and telling of it, so that totals are told in order.
//   - processIO.mu: descriptors of a process's stdio.
//
// They are taken in this order. Containers share no lock but Manager.mu and the registries' (Streams, events), so that
// none waits for another.
//
// # Tests
//
// Most tests run real containers: as root, with busybox-static, on any cgroup version. Those in vm_test.go need cgroup
// v2 with controllers; build the static test binary and run it as root in a VM:
//
//	CGO_ENABLED=1 go test -c -tags 'seccomp netgo osusergo' -ldflags '-linkmode external -extldflags -static' ./agent/container
package container
