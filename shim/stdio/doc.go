// SPDX-License-Identifier: Apache-2.0

// Package stdio moves the bytes of a process between the guest's streams and wherever containerd wants them: FIFOs,
// files, or logging programs (binary://, binary-v2://).
//
// # Life of a relay
//
//	opened --Attach--> attached --Close--> closed
//	opened --Close--> closed
//
// Open takes the ends on the host, Attach the guest's streams, which starts one goroutine a stream; that of stdin starts
// when OpenStdin was called as well. Each ends with its stream's end or with Close, which waits for nobody.
//
// # FIFOs
//
// A FIFO is opened for reading and writing at once. Such an open never waits for the other side; while the shim holds
// it, a containerd that restarts loses nothing that is in the FIFO and finds it as it was; and a client that closes
// its end of stdin is seen as gone, not as the end of input. The end of input is only what CloseStdin says: it takes
// what is in the FIFO at that time and then closes the guest's stream for writing, so that the end follows the last
// byte in the stream itself. An output FIFO is closed when the guest's stream ends, which is what tells containerd.
//
// # Locks and trust
//
// Each direction has a mutex for its few fields; no lock is held over I/O. What comes out of the guest is copied, never
// looked at. Paths and programs come from containerd, which is trusted.
package stdio
