// SPDX-License-Identifier: Apache-2.0

package vhostuser

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	rxIndex = 0
	txIndex = 1
	// numQueues counts the event queue too, which QEMU handles itself.
	numQueues = 3

	featureProtocol = 1 << 30 // VHOST_USER_F_PROTOCOL_FEATURES
	featureVersion1 = 1 << 32 // VIRTIO_F_VERSION_1
	offeredFeatures = featureProtocol | featureVersion1

	protocolMQ       = 1 << 0
	protocolReplyAck = 1 << 3
	protocolConfig   = 1 << 9
	offeredProtocol  = protocolMQ | protocolReplyAck | protocolConfig
)

// errFrontEndGone is why a device ends with its VM.
var errFrontEndGone = fmt.Errorf("QEMU has closed the connection to the vsock device: %w", syscall.ECONNRESET)

// control is the goroutine that serves QEMU's messages. It alone uses these fields.
type control struct {
	d        *Device
	features uint64
	mem      *memory
	queues   [numQueues]vring
}

// vring is a queue as the messages have described it so far.
type vring struct {
	num     uint32
	base    uint16
	addr    *vringAddr
	kick    *os.File
	enabled bool
	worker  chan struct{} // closed when its goroutine has ended; nil: not running

	stopping atomic.Bool // read by the worker
}

func newControl(d *Device) *control { return &control{d: d} }

// serve ends when the connection does, and leaves nothing behind.
func (c *control) serve() {
	defer close(c.d.done)
	err := c.loop()
	if errors.Is(err, io.EOF) || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE) {
		err = errFrontEndGone
	}
	// A guest may have sent its last words just before its end.
	for i := range c.queues {
		c.stop(i)
	}
	c.d.fail(err)
	if err := errors.Join(c.release(), c.closeConn()); err != nil {
		c.d.log.WithError(err).Warn("vsock device: release")
	}
}

func (c *control) closeConn() error {
	if err := c.d.conn.Close(); !errors.Is(err, net.ErrClosed) {
		return err
	}
	return nil // Device.Close was first
}

// release gives everything back but the connection. The queues are stopped.
func (c *control) release() error {
	d := c.d
	d.trimmer.Stop()
	d.recheckTimer.Stop()
	for i := range c.queues {
		c.setKick(i, nil)
	}
	d.tx.setCall(-1)
	d.rx.setCall(-1)
	d.tx.mu.Lock()
	defer d.tx.mu.Unlock()
	d.rx.mu.Lock()
	defer d.rx.mu.Unlock()
	mem := c.mem
	c.mem, d.mem = nil, nil
	return mem.unmap()
}

func (c *control) loop() error {
	for {
		m, err := readMessage(c.d.conn)
		if err != nil {
			return fmt.Errorf("vhost-user: %w", err)
		}
		reply, err := c.handle(m)
		m.closeFDs() // those that handle did not take
		if err != nil {
			err = fmt.Errorf("vhost-user request %d: %w", m.request, err)
		}
		if reply == nil && m.needReply() {
			status := uint64(0)
			if err != nil {
				status = 1
			}
			reply = u64Payload(status)
		}
		if reply != nil {
			if _, werr := c.d.conn.Write(encodeReply(m.request, reply)); werr != nil && err == nil {
				err = fmt.Errorf("vhost-user: %w", werr)
			}
		}
		if err != nil {
			return err
		}
	}
}

// handle returns the payload of the reply for requests that have one.
func (c *control) handle(m *message) ([]byte, error) {
	switch m.request {
	case reqGetFeatures:
		return u64Payload(offeredFeatures), nil
	case reqGetProtocolFeatures:
		return u64Payload(offeredProtocol), nil
	case reqGetQueueNum:
		return u64Payload(numQueues), nil
	case reqGetConfig:
		return configReply(m.payload, binary.LittleEndian.AppendUint64(nil, uint64(c.d.guestCID)))
	case reqSetOwner:
		return nil, nil
	case reqSetFeatures:
		return nil, c.setFeatures(m)
	case reqSetProtocolFeatures:
		v, err := parseU64(m.payload)
		if err == nil && v&^uint64(offeredProtocol) != 0 {
			err = fmt.Errorf("protocol features %#x were not offered", v&^uint64(offeredProtocol))
		}
		return nil, err
	case reqSetMemTable:
		return nil, c.setMemTable(m)
	case reqSetVringNum, reqSetVringBase, reqSetVringEnable, reqGetVringBase:
		return c.vringState(m)
	case reqSetVringAddr:
		return nil, c.setVringAddr(m)
	case reqSetVringKick, reqSetVringCall, reqSetVringErr:
		return nil, c.vringFD(m)
	}
	return nil, errors.New("not supported")
}

func (c *control) setFeatures(m *message) error {
	v, err := parseU64(m.payload)
	if err != nil {
		return err
	}
	if v&^uint64(offeredFeatures) != 0 {
		return fmt.Errorf("features %#x were not offered", v&^uint64(offeredFeatures))
	}
	c.features = v
	return nil
}

// setMemTable replaces the guest's memory. The rings stop while it is exchanged: what runs in another goroutine holds a
// queue's lock.
func (c *control) setMemTable(m *message) error {
	specs, err := parseMemTable(m.payload, len(m.fds))
	if err != nil {
		return err
	}
	mem, err := mapMemory(specs, m.fds)
	if err != nil {
		return err
	}
	d := c.d
	d.tx.mu.Lock()
	defer d.tx.mu.Unlock()
	d.rx.mu.Lock()
	defer d.rx.mu.Unlock()
	old := c.mem
	c.mem, d.mem = mem, mem
	var errs []error
	for i, q := range c.both() {
		if q.ring == nil {
			continue
		}
		v := &c.queues[i]
		r, err := newRing(i, mem, v.num, *v.addr, q.ring.lastAvail)
		if err != nil {
			errs = append(errs, err)
			q.ring = nil
			continue
		}
		r.usedIdx, r.flags, r.unsignaled = q.ring.usedIdx, q.ring.flags, q.ring.unsignaled
		q.ring = r
	}
	return errors.Join(append(errs, old.unmap())...)
}

func (c *control) both() [2]*queue { return [2]*queue{&c.d.rx.queue, &c.d.tx} }

func (c *control) index(i uint32) (int, error) {
	if i >= numQueues {
		return 0, fmt.Errorf("queue %d; there are %d", i, numQueues)
	}
	return int(i), nil
}

func (c *control) vringState(m *message) ([]byte, error) {
	s, err := parseVringState(m.payload)
	if err != nil {
		return nil, err
	}
	i, err := c.index(s.index)
	if err != nil {
		return nil, err
	}
	v := &c.queues[i]
	running := v.worker != nil
	switch m.request {
	case reqGetVringBase:
		c.stop(i)
		c.setKick(i, nil)
		return vringState{s.index, uint32(v.base)}.encode(), nil
	case reqSetVringEnable:
		v.enabled = s.num != 0
		if !v.enabled {
			c.stop(i)
		}
		return nil, c.start(i)
	case reqSetVringNum:
		if running || s.num == 0 || s.num > maxRingSize {
			return nil, fmt.Errorf("size %d for queue %d (running: %t)", s.num, i, running)
		}
		v.num = s.num
	case reqSetVringBase:
		if running || s.num > 0xffff {
			return nil, fmt.Errorf("index %d for queue %d (running: %t)", s.num, i, running)
		}
		v.base = uint16(s.num)
	}
	return nil, nil
}

func (c *control) setVringAddr(m *message) error {
	a, err := parseVringAddr(m.payload)
	if err != nil {
		return err
	}
	i, err := c.index(a.index)
	if err != nil {
		return err
	}
	if c.queues[i].worker != nil {
		return fmt.Errorf("addresses for queue %d, which is running", i)
	}
	c.queues[i].addr = &a
	return nil
}

func (c *control) vringFD(m *message) error {
	v, err := parseU64(m.payload)
	if err != nil {
		return err
	}
	i, err := c.index(uint32(v & vringIndexMask))
	if err != nil {
		return err
	}
	fd := -1
	if v&vringNoFD == 0 {
		if fd, err = m.takeFD(); err != nil {
			return err
		}
		if err := unix.SetNonblock(fd, true); err != nil {
			return errors.Join(fmt.Errorf("file descriptor of queue %d: %w", i, err), unix.Close(fd))
		}
	}
	switch {
	case m.request == reqSetVringCall && i < 2:
		c.both()[i].setCall(fd)
		return nil
	case m.request != reqSetVringKick:
		// Faults are told by Device.Err, and to the guest by silence.
		if fd >= 0 {
			_ = unix.Close(fd)
		}
		return nil
	case fd < 0:
		return fmt.Errorf("queue %d is to be polled, which is not supported", i)
	}
	kick := os.NewFile(uintptr(fd), "kick")
	if err := kick.SetReadDeadline(time.Time{}); err != nil {
		return errors.Join(fmt.Errorf("kick of queue %d is no event fd: %w", i, err), kick.Close())
	}
	c.stop(i)
	c.setKick(i, kick)
	return c.start(i)
}

func (c *control) setKick(i int, f *os.File) {
	if old := c.queues[i].kick; old != nil {
		_ = old.Close()
	}
	c.queues[i].kick = f
}

// start runs a queue once everything is known of it.
func (c *control) start(i int) error {
	v := &c.queues[i]
	enabled := v.enabled || c.features&featureProtocol == 0
	if i >= 2 || v.worker != nil || v.kick == nil || !enabled || c.d.failed() {
		return nil
	}
	switch {
	case c.features&featureVersion1 == 0:
		return errors.New("the guest's driver does not know virtio 1.0")
	case c.mem == nil || v.addr == nil || v.num == 0:
		return fmt.Errorf("queue %d is started without memory, size or addresses", i)
	}
	r, err := newRing(i, c.mem, v.num, *v.addr, v.base)
	if err != nil {
		return err
	}
	q := c.both()[i]
	q.mu.Lock()
	q.ring = r
	r.publish() // the flags may be those of an earlier run
	q.mu.Unlock()
	service := func() (bool, error) { return false, c.d.rx.service() }
	if i == txIndex {
		service = func() (bool, error) { return c.d.txBatch(txTurn) }
	}
	kick, done := v.kick, make(chan struct{})
	v.worker = done
	v.stopping.Store(false)
	go func() {
		defer close(done)
		c.d.work(kick, &v.stopping, service)
	}()
	return nil
}

// work serves a queue at its start and for each kick, until it is told to stop. stopping is for a guest that always has
// more, and would never let it come to the read whose deadline passes.
func (d *Device) work(kick *os.File, stopping *atomic.Bool, service func() (more bool, err error)) {
	var count [8]byte
	for !stopping.Load() {
		more, err := service()
		d.check(err)
		if more {
			continue
		}
		if _, err := kick.Read(count[:]); err != nil {
			return
		}
	}
}

// stop stops a queue; its base is where to go on. What the guest has sent by now is handled first.
func (c *control) stop(i int) {
	v := &c.queues[i]
	if v.worker == nil {
		return
	}
	v.stopping.Store(true)
	// A read deadline ends the goroutine's wait and leaves the file usable.
	_ = v.kick.SetReadDeadline(time.Unix(1, 0))
	<-v.worker
	_ = v.kick.SetReadDeadline(time.Time{})
	v.worker = nil
	if i == txIndex {
		if _, err := c.d.txBatch(int(v.num) + 1); err != nil {
			c.d.fail(err)
		}
	}
	q := c.both()[i]
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.ring != nil {
		v.base = q.ring.lastAvail
		q.ring = nil
	}
}
