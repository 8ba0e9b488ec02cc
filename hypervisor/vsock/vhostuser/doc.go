// SPDX-License-Identifier: Apache-2.0

// Package vhostuser is a virtio-vsock device that lives in this process. It is the back end that QEMU's
// vhost-user-vsock-pci talks to, so that a VM has vsock on a host without /dev/vhost-vsock, without a daemon and
// without context ids that must be unique on the host.
//
// # Parts
//
//	QEMU ── vhost-user messages over a socketpair ── control.go, message.go
//	guest memory (SET_MEM_TABLE, mmap) ───────────── memory.go
//	split virtqueues in that memory ──────────────── ring.go
//	  queue 0, host to guest ─────────────────────── rx.go   (written by whoever calls Write: no goroutine between)
//	  queue 1, guest to host ─────────────────────── tx.go   (one goroutine; it never blocks on a stream)
//	virtio-vsock packets, streams, listeners ─────── packet.go, stream.go, peer.go, listener.go, device.go
//
// The protocol is that of the virtio 1.2 specification, section 5.10, with Linux's virtio_transport as the peer; the
// messages are those of QEMU's docs/interop/vhost-user.rst. Offered are VERSION_1 and, of vhost-user, MQ, REPLY_ACK
// and CONFIG. Not offered are indirect descriptors, so a chain is never longer than its queue, and EVENT_IDX: the
// Linux vsock driver turns interrupts off while it works on a queue, by which the plain flags save the same
// notifications. Interrupts that only tell the guest to free what it has sent are put off for a moment (tx.go).
//
// # States of a stream
//
//	Dial:   connecting ── RESPONSE ──> established          connecting ── RST ──> done (ErrRefused)
//	guest:  REQUEST ──> established, in a listener's backlog, RESPONSE sent
//	established ── guest's SHUTDOWN of both directions ──> done; RST is the answer that Linux waits for. What the guest
//	               sent before is still read.
//	established ── Close ──> closing: SHUTDOWN of both directions sent ── RST, or CloseTimeout ──> done
//	established ── RST, protocol violation, end of the VM ──> done
//
// Half-closes do not change the state; they set a bit for each end and direction.
//
// # Flow control and memory
//
// A Write puts the bytes straight into receive buffers of the guest, as far as the guest's credit goes, and blocks for
// the rest: the host side holds no send buffers. What the guest sends goes into the buffer of a waiting Read, else into
// chunks that are allocated as data comes and given back as it is read, never more than the credit of the stream
// (Config.BufferSize; much less while it waits to be accepted). A slow reader only stops its own stream.
// A control packet that finds no receive buffer is a bit in its stream; answers to packets without a stream
// are a short bounded queue, and what is over is dropped.
//
// # Whom it trusts
//
// Nobody. The guest owns the rings and the packets: each descriptor and header is read once, checked, and used from the
// copy. A broken ring stops the device (RingError), a broken packet stream resets that stream. QEMU owns the messages
// and the memory files: sizes and overlaps are checked, and a file must carry F_SEAL_SHRINK, because a page that is
// truncated away would kill this process with SIGBUS.
//
// # Locks
//
// In this order: Device.tx.mu, stream.mu, Device.mu, Device.rx.mu. Guest memory is only touched with tx.mu or rx.mu
// held, and unmapped only with both held. stream.rmu and stream.wmu, which serialise Reads and Writes of a stream as
// package net does, come before all of them. None of tx.mu, stream.mu, Device.mu, rx.mu is held over anything that
// blocks (the write to a call eventfd is non-blocking).
package vhostuser
