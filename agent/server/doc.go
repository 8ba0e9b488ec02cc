// SPDX-License-Identifier: Apache-2.0

// Package server is the agent's side of the agent protocol: it says Hello to the host, serves the requests of agentv1
// over ttrpc, takes stdio streams, and hands the work to the packages storage, network, boot and container.
//
// # Life
//
// Run listens for further connections first, then dials the host (the ready connection) and exchanges Hello and
// HelloReply, which has the launch's token. If the versions do not fit, both sides say so. Then requests are served, on the
// ready connection and on each accepted one. Run ends when the host asked for Shutdown or the ready connection ended (the
// shim is gone, and nobody is left who could use this guest); it ends the containers and powers the guest off, whatever the
// reason was.
//
// # Trust
//
// The host is hostile. A request is bounded by ttrpc's message size; what it may ask for is checked by the package that
// does it. A panic in a handler is an Internal error and a log line, not the end of PID 1.
//
// Every connection but the ready one, which the agent makes itself, has to begin with the launch's token: with the kernel's
// vsock each process of the host can connect, whoever runs it (gate). One without it gets no answer, and cannot keep the
// shim's out. Connections of the guest's own processes, which can open AF_VSOCK sockets too, are closed by their address
// before that.
//
// # Locks
//
// There are none here but those of the count of connections and of the gate's list. Each request runs in a goroutine of its own; package
// container keeps those of different containers apart.
package server
