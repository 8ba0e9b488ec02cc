// SPDX-License-Identifier: Apache-2.0

package vhostuser

import (
	"encoding/binary"
	"io"
	"os"
	"testing"
	"time"

	"github.com/sirupsen/logrus"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// bareDevice is a device without QEMU.
func bareDevice(t testing.TB, cfg Config) *Device {
	quiet := logrus.New()
	quiet.SetOutput(io.Discard)
	cfg.GuestCID, cfg.Logger = testCID, logrus.NewEntry(quiet)
	d, err := newDevice(cfg)
	require.NoError(t, err)
	return d
}

// FuzzMessages reads the input as a sequence of messages: request, kind of fds, number of fds, length, payload.
func FuzzMessages(f *testing.F) {
	msg := func(request, kind, fds byte, payload []byte) []byte {
		return append([]byte{request, kind, fds, byte(len(payload)), byte(len(payload) >> 8)}, payload...)
	}
	var start []byte
	start = append(start, msg(reqSetFeatures, 0, 0, u64Payload(offeredFeatures))...)
	start = append(start, msg(reqSetMemTable, 0, 1, memTable(regionSpec{0, 65536, 0, 0}))...)
	for i := range uint32(2) {
		addr := binary.NativeEndian.AppendUint32(binary.NativeEndian.AppendUint32(nil, i), 0)
		for _, a := range []uint64{0, 0x3000, 0x2000, 0} {
			addr = binary.NativeEndian.AppendUint64(addr, a)
		}
		start = append(start, msg(reqSetVringNum, 0, 0, vringState{i, 128}.encode())...)
		start = append(start, msg(reqSetVringBase, 0, 0, vringState{i, 0}.encode())...)
		start = append(start, msg(reqSetVringAddr, 0, 0, addr)...)
		start = append(start, msg(reqSetVringCall, 1, 1, u64Payload(uint64(i)))...)
		start = append(start, msg(reqSetVringKick, 1, 1, u64Payload(uint64(i)))...)
		start = append(start, msg(reqSetVringEnable, 0, 0, vringState{i, 1}.encode())...)
	}
	f.Add(start)
	f.Add(append(start, msg(reqSetMemTable, 0, 1, memTable(regionSpec{4096, 4096, 4096, 4096}))...))
	f.Add(append(start, msg(reqGetVringBase, 0, 0, vringState{1, 0}.encode())...))
	f.Add(msg(reqSetMemTable, 0, 2, memTable(regionSpec{0, 4096, 0, 0}, regionSpec{4096, 4096, 4096, 4096})))
	f.Add(msg(reqGetConfig, 0, 0, append(binary.NativeEndian.AppendUint32(binary.NativeEndian.AppendUint32(nil, 4), 8), make([]byte, 12)...)))
	f.Fuzz(func(t *testing.T, in []byte) {
		memfd, err := unix.MemfdCreate("guest", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
		require.NoError(t, err)
		defer unix.Close(memfd)
		require.NoError(t, unix.Ftruncate(memfd, 65536))
		_, err = unix.FcntlInt(uintptr(memfd), unix.F_ADD_SEALS, unix.F_SEAL_SHRINK)
		require.NoError(t, err)
		c := newControl(bareDevice(t, Config{}))
		defer func() {
			for i := range c.queues {
				c.stop(i)
			}
			c.d.fail(os.ErrClosed)
			require.NoError(t, c.release())
		}()
		for len(in) >= 5 {
			var head [messageHeaderLen]byte
			binary.NativeEndian.PutUint32(head[0:], uint32(in[0]))
			binary.NativeEndian.PutUint32(head[4:], messageVersion)
			binary.NativeEndian.PutUint32(head[8:], uint32(in[3])|uint32(in[4])<<8)
			m, size, err := parseMessageHeader(&head)
			if err != nil {
				return
			}
			require.LessOrEqual(t, size, maxMessagePayload)
			kind, fds := in[1], in[2]%(maxMessageFDs+1)
			in = in[5:]
			size = min(size, len(in))
			m.payload, in = in[:size], in[size:]
			for range fds {
				fd := -1
				if kind%2 == 0 {
					fd, err = unix.Dup(memfd)
				} else {
					fd, err = unix.Eventfd(1, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
				}
				require.NoError(t, err)
				m.fds = append(m.fds, fd)
			}
			_, err = c.handle(&m)
			m.closeFDs()
			if err != nil {
				return
			}
		}
	})
}

// FuzzMessageHeader feeds what comes before the payload. (Control data is the kernel's, not the sender's.)
func FuzzMessageHeader(f *testing.F) {
	f.Add([]byte{1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0})
	f.Add([]byte{5, 0, 0, 0, 9, 0, 0, 0, 40, 0, 0, 0})
	f.Add([]byte{5, 0, 0, 0, 5, 0, 0, 0, 0, 2, 0, 0})
	f.Fuzz(func(t *testing.T, head []byte) {
		if len(head) < messageHeaderLen {
			return
		}
		if m, size, err := parseMessageHeader((*[messageHeaderLen]byte)(head)); err == nil {
			require.LessOrEqual(t, size, maxMessagePayload)
			require.Zero(t, m.flags&flagReply)
		}
	})
}

const (
	fuzzRing   = 16
	fuzzMemory = 4096
)

// fuzzRingOver lays a ring over the start of a memory that the input fills.
func fuzzRingOver(t testing.TB, queue int, in []byte) *ring {
	fd, err := unix.MemfdCreate("guest", unix.MFD_CLOEXEC)
	require.NoError(t, err)
	defer unix.Close(fd)
	require.NoError(t, unix.Ftruncate(fd, fuzzMemory))
	data, err := unix.Mmap(fd, 0, fuzzMemory, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	require.NoError(t, err)
	t.Cleanup(func() { _ = unix.Munmap(data) })
	copy(data, in)
	m := &memory{regions: []region{
		{guestAddr: 0, userAddr: 0, data: data[:2048:2048]},
		{guestAddr: 2048, userAddr: 2048, data: data[2048:3072:3072]},
		{guestAddr: 1 << 20, userAddr: 1 << 20, data: data[3072:]},
	}}
	r, err := newRing(queue, m, fuzzRing, vringAddr{desc: 0, avail: 256, used: 320}, 0)
	require.NoError(t, err)
	return r
}

// ringSeed is descriptors, then an avail ring that offers the heads.
func ringSeed(heads []uint16, descs ...[4]uint64) []byte {
	b := make([]byte, 320)
	for i, d := range descs {
		e := b[descLen*i:]
		binary.LittleEndian.PutUint64(e, d[0])
		binary.LittleEndian.PutUint32(e[8:], uint32(d[1]))
		binary.LittleEndian.PutUint16(e[12:], uint16(d[2]))
		binary.LittleEndian.PutUint16(e[14:], uint16(d[3]))
	}
	binary.LittleEndian.PutUint16(b[258:], uint16(len(heads)))
	for i, h := range heads {
		binary.LittleEndian.PutUint16(b[260+2*i:], h)
	}
	return b
}

// FuzzChains walks whatever chains the input makes, in both directions.
func FuzzChains(f *testing.F) {
	f.Add(ringSeed([]uint16{0}, [4]uint64{1000, 44, 0, 0}), false)
	f.Add(ringSeed([]uint16{0, 2}, [4]uint64{1000, 44, 3, 1}, [4]uint64{2040, 100, 2, 0}, [4]uint64{1 << 20, 1024, 2, 0}), true)
	f.Add(ringSeed([]uint16{0}, [4]uint64{0, 1, 1, 1}, [4]uint64{0, 1, 1, 0}), false)
	f.Add(ringSeed([]uint16{0}, [4]uint64{3070, 4, 0, 0}), false)
	f.Add(ringSeed([]uint16{99}), false)
	f.Add(ringSeed([]uint16{0}, [4]uint64{0, 1, 4, 0}), false)
	f.Fuzz(func(t *testing.T, in []byte, writable bool) {
		r := fuzzRingOver(t, 0, in)
		for range fuzzRing + 1 {
			head, c, ok, err := r.next(writable)
			if err != nil || !ok {
				return
			}
			total := 0
			for _, s := range c.segs {
				total += len(s)
			}
			require.Equal(t, total, c.total)
			require.LessOrEqual(t, total, maxChainBytes)
			require.Less(t, int(head), fuzzRing)
			if writable {
				c.write(make([]byte, 100))
			} else {
				c.read(make([]byte, 100))
			}
			r.push(head, 0)
			r.publish()
			_ = r.wantsCall()
		}
		t.Fatal("more chains than the ring holds")
	})
}

// FuzzPackets feeds packets: a step of the host, then the fields that matter, then the data.
func FuzzPackets(f *testing.F) {
	type pkt struct {
		host, op, flags, port, typ, size byte
		alloc, fwd                       uint32
	}
	enc := func(ps ...pkt) (b []byte) {
		for _, p := range ps {
			b = append(b, p.host, p.op, p.flags, p.port, p.typ, p.size)
			b = binary.LittleEndian.AppendUint32(b, p.alloc)
			b = binary.LittleEndian.AppendUint32(b, p.fwd)
		}
		return b
	}
	f.Add(enc(pkt{op: opRequest, typ: 1, alloc: 65536}, pkt{op: opData, typ: 1, size: 200}, pkt{host: 1, op: opShutdown, flags: 3, typ: 1}))
	f.Add(enc(pkt{op: opResponse, port: 9, typ: 1, alloc: 100}, pkt{op: opData, port: 9, typ: 1, size: 255},
		pkt{host: 3, op: opReset, port: 9, typ: 1}))
	f.Add(enc(pkt{op: opRequest, typ: 1}, pkt{op: opRequest, port: 1, typ: 1}, pkt{op: opCreditRequest, typ: 1},
		pkt{host: 2, op: opCreditUpdate, typ: 1, fwd: 99}))
	f.Add(enc(pkt{op: opRequest, typ: 2}, pkt{op: 77, typ: 1}, pkt{op: opData, port: 3, typ: 1}))
	f.Fuzz(func(t *testing.T, in []byte) {
		const bufferSize = 512
		d := bareDevice(t, Config{MaxStreams: 4, BufferSize: bufferSize, CloseTimeout: time.Hour})
		defer d.trimmer.Stop()
		defer d.recheckTimer.Stop()
		defer d.fail(os.ErrClosed)
		d.tx.ring = &ring{queue: 1}
		l, err := d.Listen(1024)
		require.NoError(t, err)
		out, err := d.newOutgoing(9)
		require.NoError(t, err)
		streams := []*stream{out}
		for ; len(in) >= 14; in = in[14:] {
			switch in[0] % 8 {
			case 1:
				for len(l.(*listener).backlog) > 0 {
					c, err := l.Accept()
					require.NoError(t, err)
					streams = append(streams, c.(*stream))
				}
			case 2:
				_ = streams[len(streams)-1].CloseWrite()
			case 3:
				_ = streams[len(streams)-1].CloseRead()
			case 4:
				if s := streams[len(streams)-1]; s != out {
					_ = s.Close()
				}
			case 5:
				for _, s := range streams {
					_ = s.SetReadDeadline(time.Unix(1, 0))
					_, _ = s.Read(make([]byte, 100))
				}
			}
			h := packetHeader{
				srcCID: testCID, dstCID: 2, srcPort: uint32(in[3]), dstPort: 1024, op: uint16(in[1]), flags: uint32(in[2]),
				typ: uint16(in[4]), length: uint32(in[5]),
				bufAlloc: binary.LittleEndian.Uint32(in[6:]), fwdCnt: binary.LittleEndian.Uint32(in[10:]),
			}
			if in[3] == 9 {
				h.dstPort = out.ports.host
			}
			raw := make([]byte, packetHeaderLen+int(in[5]))
			h.encode((*[packetHeaderLen]byte)(raw))
			c := chain{segs: [][]byte{raw[:20], raw[20:]}, total: len(raw)}
			require.NoError(t, d.packet(&c))
			require.LessOrEqual(t, len(d.streams), d.maxStreams)
			require.LessOrEqual(t, len(d.rx.resets), maxResets)
			require.LessOrEqual(t, len(d.rx.control), d.maxStreams)
			for _, s := range streams {
				require.LessOrEqual(t, s.buf.length, bufferSize)
				require.LessOrEqual(t, s.txCnt-s.peerFwd, uint32(1<<31))
			}
		}
	})
}
