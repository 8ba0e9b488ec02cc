// SPDX-License-Identifier: Apache-2.0

// Package guest is the host's client of one pod's agent: the handshake on the connection that the agent opens, the calls
// of the agent's service, the streams of processes, and the agent's events.
//
// A Client holds two ttrpc connections: one for calls that are answered at once or within the caller's time, and one
// for those that wait (events, ends of processes), so that neither waits behind the other. It knows the wire; what a
// pod does with its guest is package virtcontainers'.
//
// # States
//
// Accept returns a Client that is connected. It stays so until Close, or until the guest is gone; calls return
// errdefs.ErrUnavailable then. Lost returns a Client that never was connected, for a pod that has no guest.
//
// # Locks
//
// A Client is immutable but for the end of its connections, which is guarded by a sync.Once. All methods may be called
// at the same time.
//
// # Trust
//
// The guest is hostile: of its errors only the code and bounded words are taken, what it says of itself is bounded
// before anybody quotes it (Word), and answers that would make this side spin end the connection.
package guest
