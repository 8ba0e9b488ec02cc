// SPDX-License-Identifier: Apache-2.0

package vhostuser

import "encoding/binary"

// virtio 1.2, section 5.10.6: struct virtio_vsock_hdr.
const (
	packetHeaderLen = 44

	typeStream = 1

	opRequest       = 1
	opResponse      = 2
	opReset         = 3
	opShutdown      = 4
	opData          = 5 // VIRTIO_VSOCK_OP_RW
	opCreditUpdate  = 6
	opCreditRequest = 7

	// What the sender of a SHUTDOWN no longer does.
	shutReceive = 1 << 0
	shutSend    = 1 << 1
	shutBoth    = shutReceive | shutSend

	// maxPacketData is the most payload that is put into one packet: Linux's VIRTIO_VSOCK_MAX_PKT_BUF_SIZE.
	maxPacketData = 64 << 10
)

type packetHeader struct {
	srcCID, dstCID   uint64
	srcPort, dstPort uint32
	length           uint32
	typ, op          uint16
	flags            uint32
	bufAlloc, fwdCnt uint32
}

func decodePacketHeader(b *[packetHeaderLen]byte) packetHeader {
	le := binary.LittleEndian
	return packetHeader{
		srcCID: le.Uint64(b[0:]), dstCID: le.Uint64(b[8:]),
		srcPort: le.Uint32(b[16:]), dstPort: le.Uint32(b[20:]),
		length: le.Uint32(b[24:]),
		typ:    le.Uint16(b[28:]), op: le.Uint16(b[30:]),
		flags:    le.Uint32(b[32:]),
		bufAlloc: le.Uint32(b[36:]), fwdCnt: le.Uint32(b[40:]),
	}
}

func (h *packetHeader) encode(b *[packetHeaderLen]byte) {
	le := binary.LittleEndian
	le.PutUint64(b[0:], h.srcCID)
	le.PutUint64(b[8:], h.dstCID)
	le.PutUint32(b[16:], h.srcPort)
	le.PutUint32(b[20:], h.dstPort)
	le.PutUint32(b[24:], h.length)
	le.PutUint16(b[28:], h.typ)
	le.PutUint16(b[30:], h.op)
	le.PutUint32(b[32:], h.flags)
	le.PutUint32(b[36:], h.bufAlloc)
	le.PutUint32(b[40:], h.fwdCnt)
}
