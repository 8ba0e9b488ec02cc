// SPDX-License-Identifier: Apache-2.0

package vhostuser

import (
	"time"

	"github.com/cloister-project/cloister/hypervisor/vsock"
)

const (
	// txTurn is how many packets are handled before the lock is free for a moment.
	txTurn = 32
	// recheckDelay is how long the guest may wait until it is interrupted to free what it has sent (nothing but its memory
	// depends on that while the queue has room, and otherwise each packet would cost an interrupt), and how long a lost
	// notification stays unnoticed.
	recheckDelay = 2 * time.Millisecond
)

// txBatch handles up to limit packets. more is false once the guest has been asked for a kick.
func (d *Device) txBatch(limit int) (more bool, err error) {
	q := &d.tx
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.ring == nil || d.failed() {
		return false, nil
	}
	q.ring.setKicks(false)
	for range limit {
		head, c, ok, err := q.ring.next(false)
		if err == nil && ok {
			err = d.packet(c)
		}
		if err != nil {
			q.ring = nil
			return false, err
		}
		if !ok {
			d.signalTx()
			// Ask for a kick first, then look again: a packet that came in between brings no kick.
			q.ring.setKicks(true)
			n, err := q.ring.available()
			if err != nil {
				q.ring = nil
			}
			return n > 0, err
		}
		q.ring.push(head, 0)
	}
	d.signalTx()
	return true, nil
}

// signalTx tells the guest what was taken: at once if that is a good part of the queue, for which it may be waiting,
// else a little later. The caller holds tx.mu.
func (d *Device) signalTx() {
	r := d.tx.ring
	if r.unsignaled >= int(r.num)/4 {
		d.tx.signal()
		return
	}
	r.publish()
	if r.unsignaled > 0 {
		d.recheckSoon()
	}
}

func (d *Device) recheckSoon() {
	if !d.rechecking.Swap(true) {
		d.recheckTimer.Reset(recheckDelay)
	}
}

// recheck runs a moment after traffic. Besides the late signal it makes good a notification that was lost: the handshake
// of both sides (write, full barrier, read what the other one wrote) fails rarely when the guest's barrier is none. That
// is so under QEMU's emulation of a machine with one CPU, which runs `lock` instructions as plain ones while this
// process looks at the same memory from another CPU. A moment later everything is visible.
func (d *Device) recheck() {
	d.rechecking.Store(false)
	d.tx.mu.Lock()
	d.tx.signal()
	d.tx.interruptLate()
	d.tx.mu.Unlock()
	for more := true; more; {
		var err error
		if more, err = d.txLate(); err != nil {
			d.fail(err)
			return
		}
	}
	d.rx.mu.Lock()
	d.rx.interruptLate()
	err := d.rx.runAndWake()
	d.rx.mu.Unlock()
	d.check(err)
}

// txLate is txBatch if there is anything to do.
func (d *Device) txLate() (more bool, err error) {
	d.tx.mu.Lock()
	n := 0
	if d.tx.ring != nil {
		n, err = d.tx.ring.available()
	}
	d.tx.mu.Unlock()
	if err != nil || n == 0 {
		return false, err
	}
	return d.txBatch(txTurn)
}

// interruptLate makes up for an interrupt that the guest did not seem to want.
func (q *queue) interruptLate() {
	if q.ring != nil && q.quiet {
		q.interrupt()
	}
}

// packet handles one packet of the guest. An error means that the ring cannot be trusted any more.
func (d *Device) packet(c *chain) error {
	if c.total < packetHeaderLen {
		return d.tx.ring.broken("a packet of %d bytes, shorter than its header", c.total)
	}
	var b [packetHeaderLen]byte
	c.read(b[:])
	h := decodePacketHeader(&b)
	if uint64(h.length) > uint64(c.total) {
		return d.tx.ring.broken("a packet of %d bytes in a buffer of %d", h.length, c.total)
	}
	// Not ours; dropped, as Linux does.
	if h.srcCID != uint64(d.guestCID) || h.dstCID != vsock.HostCID {
		return nil
	}
	d.touch()
	ports := portPair{host: h.dstPort, guest: h.srcPort}
	if h.typ == typeStream {
		if s := d.lookup(ports); s != nil {
			s.receive(&h, c)
			return nil
		}
		if h.op == opRequest && d.accept(ports, &h) {
			return nil
		}
	}
	if h.op != opReset {
		d.check(d.rx.reset(ports))
	}
	return nil
}
