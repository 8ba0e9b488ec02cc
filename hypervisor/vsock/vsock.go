// SPDX-License-Identifier: Apache-2.0

package vsock

import (
	"context"
	"errors"
	"net"
)

// HostCID is the well-known context id of the host (linux/vm_sockets.h, VMADDR_CID_HOST).
const HostCID = 2

// ErrRefused is wrapped by Dial when the guest is up but nothing listens on the port (the guest's transport answered
// VIRTIO_VSOCK_OP_RST, or the kernel ECONNRESET/ECONNREFUSED).
var ErrRefused = errors.New("connection refused by the guest")

// Conn is one vsock stream. Close ends both directions and releases everything; it is safe to call more than once and
// from any goroutine.
type Conn interface {
	net.Conn
	// CloseWrite sends what was written so far and then end-of-file to the guest (virtio-vsock SHUTDOWN with the SEND
	// flag; shutdown(SHUT_WR)). Reading goes on. It is safe to repeat.
	CloseWrite() error
	// CloseRead tells the guest that no more data is read; what arrives later is dropped or reset.
	CloseRead() error
}

// Transport carries vsock streams between the host and one guest. It exists, and its listeners are bound, before the VM
// starts; it outlives the VM by at most its own Close.
//
// Everything that comes out of a Transport was written by the guest and is hostile.
type Transport interface {
	// Dial connects to a port of the guest. It waits until the guest's driver is up, or ctx ends. A port without a
	// listener returns an error that wraps ErrRefused.
	Dial(ctx context.Context, port uint32) (Conn, error)
	// Listen accepts the guest's connections to (HostCID, port). Accept returns a Conn. A connection of the guest to a
	// port without a listener is refused. A port that is in use already gives errdefs.ErrAlreadyExists.
	Listen(port uint32) (net.Listener, error)
	// Close ends every connection and listener and releases all fds and goroutines.
	Close() error
}
