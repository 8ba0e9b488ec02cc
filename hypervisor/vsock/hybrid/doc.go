// SPDX-License-Identifier: Apache-2.0

// Package hybrid is the vsock.Transport of a VMM that has the virtio-vsock device itself and serves its streams on unix
// sockets, as Cloud Hypervisor does. To reach a port of the guest, the host connects to the device's socket, writes
// "CONNECT <port>\n" and gets a line that starts with "OK "; a port without a listener is a connection that ends without an
// answer. The guest's connections to port N of the host arrive at "<socket>_N".
//
// The end of one direction of a stream is shutdown(2) on the unix socket. The VMM must carry that to the guest and back:
// Cloud Hypervisor does since v53. This package cannot tell; the driver has to refuse an older one.
//
// Both the guest and the VMM are hostile: an answer is bounded in length, and only its prefix is looked at; connections are
// bounded in number. The sockets lie in a directory that is the VM's alone and that nobody else can enter.
//
// Transport.mu guards the set of what is open and is never held over I/O. There is one goroutine: a context.AfterFunc, while
// a Dial waits.
package hybrid
