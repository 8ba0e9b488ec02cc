// SPDX-License-Identifier: Apache-2.0

package vhostuser

import (
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"os"
	"sync/atomic"
	"testing"
	"unsafe"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

const (
	testCID      = 42
	testMemory   = 16 << 20
	testGPA      = 0x4000_0000
	testUserAddr = 0x7f00_0000_0000
	testRingSize = 128
)

// frontEnd plays QEMU: it owns the guest's memory and sends the messages.
type frontEnd struct {
	t      testing.TB
	conn   *net.UnixConn
	memfd  int
	mem    []byte // a mapping of its own
	queues [2]*driverRing
}

func newFrontEnd(t testing.TB, d *Device) *frontEnd {
	t.Helper()
	c, err := net.FileConn(d.QEMUFile())
	require.NoError(t, err)
	require.NoError(t, d.QEMUFile().Close())
	fd, err := unix.MemfdCreate("guest", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	require.NoError(t, err)
	require.NoError(t, unix.Ftruncate(fd, testMemory))
	_, err = unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, unix.F_SEAL_GROW|unix.F_SEAL_SHRINK|unix.F_SEAL_SEAL)
	require.NoError(t, err)
	mem, err := unix.Mmap(fd, 0, testMemory, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	require.NoError(t, err)
	fe := &frontEnd{t: t, conn: c.(*net.UnixConn), memfd: fd, mem: mem}
	t.Cleanup(func() {
		fe.disconnect()
		_ = unix.Close(fd)
		for _, q := range fe.queues {
			if q != nil {
				_ = q.kick.Close()
				_ = q.call.Close()
			}
		}
	})
	return fe
}

func (fe *frontEnd) disconnect() { _ = fe.conn.Close() }

func (fe *frontEnd) send(request, flags uint32, payload []byte, fds ...int) {
	fe.t.Helper()
	b := encodeReply(request, payload)
	binary.NativeEndian.PutUint32(b[4:], messageVersion|flags)
	var oob []byte
	if len(fds) > 0 {
		oob = unix.UnixRights(fds...)
	}
	_, _, err := fe.conn.WriteMsgUnix(b, oob, nil)
	require.NoError(fe.t, err)
}

func (fe *frontEnd) reply(request uint32) []byte {
	fe.t.Helper()
	var h [messageHeaderLen]byte
	_, err := io.ReadFull(fe.conn, h[:])
	require.NoError(fe.t, err)
	require.Equal(fe.t, request, binary.NativeEndian.Uint32(h[:]))
	require.Equal(fe.t, uint32(messageVersion|flagReply), binary.NativeEndian.Uint32(h[4:]))
	p := make([]byte, binary.NativeEndian.Uint32(h[8:]))
	_, err = io.ReadFull(fe.conn, p)
	require.NoError(fe.t, err)
	return p
}

// get sends a request that has a reply of its own.
func (fe *frontEnd) get(request uint32, payload []byte) []byte {
	fe.t.Helper()
	fe.send(request, 0, payload)
	return fe.reply(request)
}

// set sends a request and returns the status of the acknowledgement.
func (fe *frontEnd) set(request uint32, payload []byte, fds ...int) uint64 {
	fe.t.Helper()
	fe.send(request, flagNeedReply, payload, fds...)
	v, err := parseU64(fe.reply(request))
	require.NoError(fe.t, err)
	return v
}

func (fe *frontEnd) ok(request uint32, payload []byte, fds ...int) {
	fe.t.Helper()
	require.Zero(fe.t, fe.set(request, payload, fds...), "request %d", request)
}

func memTable(regions ...regionSpec) []byte {
	b := binary.NativeEndian.AppendUint32(nil, uint32(len(regions)))
	b = binary.NativeEndian.AppendUint32(b, 0)
	for _, r := range regions {
		for _, v := range []uint64{r.guestAddr, r.size, r.userAddr, r.fileOffset} {
			b = binary.NativeEndian.AppendUint64(b, v)
		}
	}
	return b
}

// wholeMemory is the table of a guest: two regions that lie side by side, out of one file.
func wholeMemory() []byte {
	const half = testMemory / 2
	return memTable(regionSpec{testGPA, half, testUserAddr, 0}, regionSpec{testGPA + half, half, testUserAddr + half, half})
}

func (fe *frontEnd) sendMemory() { fe.ok(reqSetMemTable, wholeMemory(), fe.memfd, fe.memfd) }

// negotiate sends what QEMU sends before the guest's driver is up.
func (fe *frontEnd) negotiate() {
	fe.t.Helper()
	features, err := parseU64(fe.get(reqGetFeatures, nil))
	require.NoError(fe.t, err)
	require.Equal(fe.t, uint64(offeredFeatures), features)
	protocol, err := parseU64(fe.get(reqGetProtocolFeatures, nil))
	require.NoError(fe.t, err)
	require.Equal(fe.t, uint64(0x209), protocol)
	fe.ok(reqSetProtocolFeatures, u64Payload(protocol))
	n, err := parseU64(fe.get(reqGetQueueNum, nil))
	require.NoError(fe.t, err)
	require.Equal(fe.t, uint64(3), n)
	fe.ok(reqSetOwner, nil)
	config := append(binary.NativeEndian.AppendUint32(binary.NativeEndian.AppendUint32(nil, 0), 8), make([]byte, 12)...)
	config = fe.get(reqGetConfig, config)
	require.Equal(fe.t, uint64(testCID), binary.LittleEndian.Uint64(config[12:]))
	fe.ok(reqSetFeatures, u64Payload(features))
	for i := range fe.queues {
		fe.queues[i] = newDriverRing(fe.t, fe.mem, i)
		// QEMU sets a call fd early, and another one later.
		fe.ok(reqSetVringCall, u64Payload(uint64(i)), fe.queues[i].callFD)
		fe.ok(reqSetVringErr, u64Payload(uint64(i)), fe.queues[i].callFD)
	}
}

// start sends what QEMU sends when the driver is up, or the VM goes on after a pause.
func (fe *frontEnd) start(base [2]uint32) {
	fe.t.Helper()
	fe.sendMemory()
	for i, q := range fe.queues {
		fe.ok(reqSetVringNum, vringState{uint32(i), testRingSize}.encode())
		fe.ok(reqSetVringBase, vringState{uint32(i), base[i]}.encode())
		a := binary.NativeEndian.AppendUint32(binary.NativeEndian.AppendUint32(nil, uint32(i)), 0)
		for _, off := range []int{q.desc, q.used, q.avail} {
			a = binary.NativeEndian.AppendUint64(a, testUserAddr+uint64(off))
		}
		fe.ok(reqSetVringAddr, binary.NativeEndian.AppendUint64(a, 0))
		fe.ok(reqSetVringKick, u64Payload(uint64(i)), q.kickFD)
		fe.ok(reqSetVringCall, u64Payload(uint64(i)), q.callFD)
		fe.ok(reqSetVringEnable, vringState{uint32(i), 1}.encode())
	}
}

func (fe *frontEnd) stop() (base [2]uint32) {
	fe.t.Helper()
	for i := range fe.queues {
		s, err := parseVringState(fe.get(reqGetVringBase, vringState{uint32(i), 0}.encode()))
		require.NoError(fe.t, err)
		base[i] = s.num
	}
	return base
}

// driverRing is the driver's side of a virtqueue.
type driverRing struct {
	mem               []byte
	desc, avail, used int // offsets in mem
	availIdx          uint16
	lastUsed          uint16
	free              []uint16
	kick, call        *os.File
	kickFD, callFD    int // of the files; File.Fd would make them block
}

func newDriverRing(t testing.TB, mem []byte, i int) *driverRing {
	base := i * 0x4000
	q := &driverRing{mem: mem, desc: base, avail: base + 0x1000, used: base + 0x2000}
	for d := range testRingSize {
		q.free = append(q.free, uint16(d))
	}
	for f, fd := range map[**os.File]*int{&q.kick: &q.kickFD, &q.call: &q.callFD} {
		var err error
		*fd, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
		require.NoError(t, err)
		*f = os.NewFile(uintptr(*fd), "eventfd")
	}
	return q
}

func (q *driverRing) setDesc(i uint16, addr uint64, length uint32, flags, next uint16) {
	d := q.mem[q.desc+descLen*int(i):]
	binary.LittleEndian.PutUint64(d, addr)
	binary.LittleEndian.PutUint32(d[8:], length)
	binary.LittleEndian.PutUint16(d[12:], flags)
	binary.LittleEndian.PutUint16(d[14:], next)
}

type buffer struct {
	off, length int
}

// add offers a chain of buffers; ok is false if there are too few descriptors.
func (q *driverRing) add(bufs []buffer, flags uint16) (head uint16, ok bool) {
	if len(q.free) < len(bufs) {
		return 0, false
	}
	ids := q.free[len(q.free)-len(bufs):]
	q.free = q.free[:len(q.free)-len(bufs)]
	for i, b := range bufs {
		f, next := flags, uint16(0)
		if i+1 < len(bufs) {
			f, next = f|descFlagNext, ids[i+1]
		}
		q.setDesc(ids[i], testGPA+uint64(b.off), uint32(b.length), f, next)
	}
	q.offer(ids[0])
	return ids[0], true
}

// offer makes a chain available; publish shows it.
func (q *driverRing) offer(head uint16) {
	binary.LittleEndian.PutUint16(q.mem[q.avail+4+2*int(q.availIdx%testRingSize):], head)
	q.availIdx++
}

func (q *driverRing) publish() {
	atomic.StoreUint32((*uint32)(unsafe.Pointer(&q.mem[q.avail])), le32(uint32(q.availIdx)<<16))
	if flags, _ := loadPair(q.mem[q.used:]); flags&usedNoNotify == 0 {
		q.notify()
	}
}

func (q *driverRing) notify() {
	var one [8]byte
	one[0] = 1
	_, _ = q.kick.Write(one[:])
}

// take returns the next used chain and frees its descriptors.
func (q *driverRing) take() (head uint16, length uint32, ok bool) {
	_, idx := loadPair(q.mem[q.used:])
	if idx == q.lastUsed {
		return 0, 0, false
	}
	e := q.mem[q.used+4+8*int(q.lastUsed%testRingSize):]
	q.lastUsed++
	id, length := binary.LittleEndian.Uint32(e), binary.LittleEndian.Uint32(e[4:])
	if id >= testRingSize {
		panic(fmt.Sprintf("used id %d", id))
	}
	for i := uint16(id); ; {
		d := q.mem[q.desc+descLen*int(i):]
		q.free = append(q.free, i)
		if binary.LittleEndian.Uint16(d[12:])&descFlagNext == 0 {
			return uint16(id), length, true
		}
		i = binary.LittleEndian.Uint16(d[14:])
	}
}

// wait waits for an interrupt; false when the ring is closed.
func (q *driverRing) wait() bool {
	var b [8]byte
	_, err := q.call.Read(b[:])
	return err == nil
}
