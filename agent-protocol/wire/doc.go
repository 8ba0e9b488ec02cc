// SPDX-License-Identifier: Apache-2.0

// Package wire holds what both ends of the agent protocol must agree on beside the messages of agentv1: ports, the
// handshake frame, the header of a stdio stream, identifiers and limits.
//
// Both ends are hostile to each other. Every read here is bounded before it allocates.
package wire
