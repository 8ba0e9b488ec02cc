// SPDX-License-Identifier: Apache-2.0

package vhostuser

import "github.com/cloister-project/cloister/hypervisor/vsock"

// txTurn is how many packets are handled before the guest is told, and the lock is free for a moment.
const txTurn = 32

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
			q.signal()
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
	q.signal()
	return true, nil
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
