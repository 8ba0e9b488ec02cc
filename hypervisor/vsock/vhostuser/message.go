// SPDX-License-Identifier: Apache-2.0

package vhostuser

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"net"

	"golang.org/x/sys/unix"
)

// The vhost-user requests that QEMU sends to a vsock device, by their names in docs/interop/vhost-user.rst.
const (
	reqGetFeatures         = 1
	reqSetFeatures         = 2
	reqSetOwner            = 3
	reqSetMemTable         = 5
	reqSetVringNum         = 8
	reqSetVringAddr        = 9
	reqSetVringBase        = 10
	reqGetVringBase        = 11
	reqSetVringKick        = 12
	reqSetVringCall        = 13
	reqSetVringErr         = 14
	reqGetProtocolFeatures = 15
	reqSetProtocolFeatures = 16
	reqGetQueueNum         = 17
	reqSetVringEnable      = 18
	reqGetConfig           = 24

	messageHeaderLen = 12
	messageVersion   = 1
	flagVersionMask  = 0x3
	flagReply        = 1 << 2
	flagNeedReply    = 1 << 3

	// maxMessagePayload holds the largest message that is accepted: GET_CONFIG with its 256 bytes, SET_MEM_TABLE with
	// 8 regions of 32 bytes.
	maxMessagePayload = 512
	maxMemoryRegions  = 8
	maxMessageFDs     = maxMemoryRegions
	maxConfigLen      = 256

	vringIndexMask = 0xff
	vringNoFD      = 1 << 8
)

type message struct {
	request uint32
	flags   uint32
	payload []byte
	fds     []int
}

func (m *message) needReply() bool { return m.flags&flagNeedReply != 0 }

// takeFD hands the only fd of the message over to the caller.
func (m *message) takeFD() (int, error) {
	if len(m.fds) != 1 {
		return -1, fmt.Errorf("%d file descriptors where there is one", len(m.fds))
	}
	fd := m.fds[0]
	m.fds = nil
	return fd, nil
}

func (m *message) closeFDs() {
	for _, fd := range m.fds {
		_ = unix.Close(fd)
	}
	m.fds = nil
}

// parseMessageHeader checks the fixed part; size is the length of the payload that follows.
func parseMessageHeader(b *[messageHeaderLen]byte) (m message, size int, err error) {
	m.request = binary.NativeEndian.Uint32(b[0:])
	m.flags = binary.NativeEndian.Uint32(b[4:])
	n := binary.NativeEndian.Uint32(b[8:])
	switch {
	case m.flags&flagVersionMask != messageVersion:
		return m, 0, fmt.Errorf("request %d has version %d, not %d", m.request, m.flags&flagVersionMask, messageVersion)
	case m.flags&flagReply != 0:
		return m, 0, fmt.Errorf("request %d is marked as a reply", m.request)
	case n > maxMessagePayload:
		return m, 0, fmt.Errorf("request %d has %d bytes, more than %d", m.request, n, maxMessagePayload)
	}
	return m, int(n), nil
}

// readMessage reads one message; the caller owns its fds. io.EOF means that the peer has closed between messages.
func readMessage(conn *net.UnixConn) (*message, error) {
	var head [messageHeaderLen]byte
	oob := make([]byte, unix.CmsgSpace(4*maxMessageFDs))
	// The fds travel with the first byte of a message.
	n, oobn, flags, _, err := conn.ReadMsgUnix(head[:], oob)
	if err != nil {
		return nil, err
	}
	if n == 0 {
		return nil, io.EOF
	}
	fds, err := parseFDs(oob[:oobn])
	m := &message{fds: fds}
	defer func() {
		if m != nil {
			m.closeFDs()
		}
	}()
	if err != nil {
		return nil, err
	}
	if flags&unix.MSG_CTRUNC != 0 {
		return nil, fmt.Errorf("a message carries more than %d file descriptors", maxMessageFDs)
	}
	if _, err := io.ReadFull(conn, head[n:]); err != nil {
		return nil, unexpectedEOF(err)
	}
	h, size, err := parseMessageHeader(&head)
	if err != nil {
		return nil, err
	}
	m.request, m.flags = h.request, h.flags
	m.payload = make([]byte, size)
	if _, err := io.ReadFull(conn, m.payload); err != nil {
		return nil, unexpectedEOF(err)
	}
	out := m
	m = nil
	return out, nil
}

func unexpectedEOF(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

// parseFDs returns the fds in the control data. On an error too, the fds found so far are the caller's.
func parseFDs(oob []byte) (fds []int, err error) {
	if len(oob) == 0 {
		return nil, nil
	}
	cmsgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, fmt.Errorf("control data of a message: %w", err)
	}
	for i := range cmsgs {
		if cmsgs[i].Header.Level != unix.SOL_SOCKET || cmsgs[i].Header.Type != unix.SCM_RIGHTS {
			continue
		}
		got, err := unix.ParseUnixRights(&cmsgs[i])
		if err != nil {
			return fds, fmt.Errorf("file descriptors of a message: %w", err)
		}
		fds = append(fds, got...)
	}
	return fds, nil
}

func encodeReply(request uint32, payload []byte) []byte {
	b := make([]byte, messageHeaderLen, messageHeaderLen+len(payload))
	binary.NativeEndian.PutUint32(b[0:], request)
	binary.NativeEndian.PutUint32(b[4:], messageVersion|flagReply)
	binary.NativeEndian.PutUint32(b[8:], uint32(len(payload)))
	return append(b, payload...)
}

func u64Payload(v uint64) []byte { return binary.NativeEndian.AppendUint64(nil, v) }

func parseU64(p []byte) (uint64, error) {
	if len(p) != 8 {
		return 0, fmt.Errorf("payload of %d bytes, not 8", len(p))
	}
	return binary.NativeEndian.Uint64(p), nil
}

// vringState is the payload of SET_VRING_NUM, SET_VRING_BASE, SET_VRING_ENABLE and GET_VRING_BASE.
type vringState struct{ index, num uint32 }

func parseVringState(p []byte) (vringState, error) {
	if len(p) != 8 {
		return vringState{}, fmt.Errorf("payload of %d bytes, not 8", len(p))
	}
	return vringState{binary.NativeEndian.Uint32(p), binary.NativeEndian.Uint32(p[4:])}, nil
}

func (s vringState) encode() []byte {
	return binary.NativeEndian.AppendUint32(binary.NativeEndian.AppendUint32(nil, s.index), s.num)
}

// vringAddr is the payload of SET_VRING_ADDR; the addresses are QEMU's.
type vringAddr struct {
	index             uint32
	desc, used, avail uint64
}

func parseVringAddr(p []byte) (vringAddr, error) {
	if len(p) != 40 {
		return vringAddr{}, fmt.Errorf("payload of %d bytes, not 40", len(p))
	}
	ne := binary.NativeEndian
	if flags := ne.Uint32(p[4:]); flags != 0 {
		return vringAddr{}, fmt.Errorf("flags %#x: dirty logging was not offered", flags)
	}
	return vringAddr{index: ne.Uint32(p), desc: ne.Uint64(p[8:]), used: ne.Uint64(p[16:]), avail: ne.Uint64(p[24:])}, nil
}

// regionSpec is one region of SET_MEM_TABLE, in bytes.
type regionSpec struct{ guestAddr, size, userAddr, fileOffset uint64 }

// parseMemTable checks everything that can be checked without the files.
func parseMemTable(p []byte, fds int) ([]regionSpec, error) {
	if len(p) < 8 {
		return nil, fmt.Errorf("payload of %d bytes", len(p))
	}
	ne := binary.NativeEndian
	n := ne.Uint32(p)
	switch {
	case n == 0 || n > maxMemoryRegions:
		return nil, fmt.Errorf("%d memory regions; 1 to %d are possible", n, maxMemoryRegions)
	case len(p) != 8+32*int(n):
		return nil, fmt.Errorf("payload of %d bytes for %d regions", len(p), n)
	case fds != int(n):
		return nil, fmt.Errorf("%d file descriptors for %d regions", fds, n)
	}
	regions := make([]regionSpec, n)
	for i := range regions {
		e := p[8+32*i:]
		r := regionSpec{ne.Uint64(e), ne.Uint64(e[8:]), ne.Uint64(e[16:]), ne.Uint64(e[24:])}
		// Half of the address space is far more than any VM, and keeps every sum below from overflowing.
		const limit = math.MaxInt64 / 4
		if r.size == 0 || r.size > limit || r.fileOffset > limit || r.guestAddr > limit || r.userAddr > math.MaxUint64-r.size {
			return nil, fmt.Errorf("memory region %d is impossible: %d bytes at %#x, offset %#x", i, r.size, r.guestAddr, r.fileOffset)
		}
		for j, o := range regions[:i] {
			if overlap(r.guestAddr, o.guestAddr, r.size, o.size) || overlap(r.userAddr, o.userAddr, r.size, o.size) {
				return nil, fmt.Errorf("memory regions %d and %d overlap", j, i)
			}
		}
		regions[i] = r
	}
	return regions, nil
}

func overlap(a, b, sizeA, sizeB uint64) bool { return a < b+sizeB && b < a+sizeA }

// configReply answers GET_CONFIG out of the device's configuration space; what lies past its end is zero.
func configReply(p, space []byte) ([]byte, error) {
	if len(p) < 12 {
		return nil, fmt.Errorf("payload of %d bytes", len(p))
	}
	ne := binary.NativeEndian
	offset, size := ne.Uint32(p), ne.Uint32(p[4:])
	if size > maxConfigLen || offset > maxConfigLen || len(p) != 12+int(size) {
		return nil, fmt.Errorf("configuration of %d bytes at %d in a payload of %d bytes", size, offset, len(p))
	}
	out := make([]byte, 12+size)
	copy(out, p[:12])
	if int(offset) < len(space) {
		copy(out[12:], space[offset:])
	}
	return out, nil
}
