// SPDX-License-Identifier: Apache-2.0

// Package qmp is a client of the QEMU Machine Protocol (docs/interop/qmp-spec.rst of QEMU) on an existing connection.
//
// A client has two goroutines from New until the connection ends: the reader, which matches replies to commands by
// their id and queues events, and the dispatcher, which hands the events to one handler, in order. A slow handler never
// delays a reply. Done is closed after both are gone, thus after the last event was handled.
//
// Locks: one mutex guards the table of pending commands and is never held over I/O; a one-place semaphore serialises
// writers, because two messages must not mix on the wire.
//
// QEMU executes a hostile guest, and may have been taken over by it: each message is bounded, so is the queue of
// events, and whatever breaks the protocol ends the connection with an error.
package qmp
