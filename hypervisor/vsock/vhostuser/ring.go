// SPDX-License-Identifier: Apache-2.0

package vhostuser

import (
	"encoding/binary"
	"fmt"
	"math/bits"
	"sync/atomic"
	"unsafe"
)

// virtio 1.2, section 2.7: split virtqueues.
const (
	descLen          = 16
	descFlagNext     = 1 << 0
	descFlagWrite    = 1 << 1
	descFlagIndirect = 1 << 2

	availNoInterrupt = 1 << 0
	usedNoNotify     = 1 << 0

	// maxRingSize is eight times the size that QEMU gives the queues of a vsock device.
	maxRingSize = 1024
	// maxChainBytes is far more than a packet; Linux posts 4 KiB buffers and sends at most 64 KiB.
	maxChainBytes = 1 << 20
)

// RingError tells how the guest broke a virtqueue. The device is stopped by it.
type RingError struct {
	// Queue is 0 for host to guest, 1 for guest to host.
	Queue int
	// What was found.
	What string
}

func (e *RingError) Error() string {
	return fmt.Sprintf("the guest's driver broke vsock queue %d: %s", e.Queue, e.What)
}

// ring is the device side of a split virtqueue. The lock of its queue guards it. Whatever the guest can write is read
// once, into a local variable, checked, and used from there.
type ring struct {
	queue      int
	mem        *memory
	num        uint32
	desc       []byte
	avail      []byte
	used       []byte
	lastAvail  uint16 // the next entry of the avail ring to take
	usedIdx    uint16 // the next entry of the used ring to write
	flags      uint16 // of the used ring
	unsignaled int    // descriptors of the chains that were pushed since the guest was last interrupted

	chain chain // of the last call to next
}

// chain is the buffers of one descriptor chain, consumed from the front.
type chain struct {
	segs  [][]byte
	total int // bytes left
	descs int // descriptors of the whole chain
	store [][]byte
}

// newRing finds the three parts of a queue. base is the avail index to go on from.
func newRing(queue int, mem *memory, num uint32, a vringAddr, base uint16) (*ring, error) {
	if num == 0 || num > maxRingSize || bits.OnesCount32(num) != 1 {
		return nil, fmt.Errorf("queue %d has %d entries; a power of two up to %d is possible", queue, num, maxRingSize)
	}
	// The alignments of section 2.7; 4 instead of 2 for the avail ring, since its flags and index are read as one
	// 32-bit word. Linux aligns it to 16.
	if a.desc%16 != 0 || a.avail%4 != 0 || a.used%4 != 0 {
		return nil, fmt.Errorf("queue %d is not aligned: descriptors %#x, avail %#x, used %#x", queue, a.desc, a.avail, a.used)
	}
	r := &ring{
		queue: queue, mem: mem, num: num, lastAvail: base,
		desc:  mem.user(a.desc, descLen*int(num)),
		avail: mem.user(a.avail, 4+2*int(num)),
		used:  mem.user(a.used, 4+8*int(num)),
	}
	if r.desc == nil || r.avail == nil || r.used == nil {
		return nil, fmt.Errorf("queue %d lies outside of the guest's memory", queue)
	}
	if !aligned(r.desc, 16) || !aligned(r.avail, 4) || !aligned(r.used, 4) {
		return nil, fmt.Errorf("queue %d is not aligned in the guest's memory", queue)
	}
	_, r.usedIdx = loadPair(r.used)
	return r, nil
}

func aligned(b []byte, n uintptr) bool { return uintptr(unsafe.Pointer(&b[0]))%n == 0 }

// le32 converts between the little-endian words of a ring and the host's order.
func le32(v uint32) uint32 {
	return binary.LittleEndian.Uint32((*[4]byte)(unsafe.Pointer(&v))[:])
}

// loadPair reads the flags and the index at the start of an avail or used ring in one access.
func loadPair(b []byte) (flags, idx uint16) {
	v := le32(atomic.LoadUint32((*uint32)(unsafe.Pointer(&b[0]))))
	return uint16(v), uint16(v >> 16)
}

// publish shows the guest the flags and all used entries. Being an atomic store it is ordered after the entries and
// before a following read of the avail ring, as both notification handshakes need.
func (r *ring) publish() {
	v := uint32(r.flags) | uint32(r.usedIdx)<<16
	atomic.StoreUint32((*uint32)(unsafe.Pointer(&r.used[0])), le32(v))
}

// setKicks asks the guest for kicks, or to leave them out; changed is false if that was so already. After asking the
// caller looks at the ring again.
func (r *ring) setKicks(on bool) (changed bool) {
	flags := uint16(usedNoNotify)
	if on {
		flags = 0
	}
	if flags == r.flags {
		return false
	}
	r.flags = flags
	r.publish()
	return true
}

// available tells how many chains wait.
func (r *ring) available() (int, error) {
	_, idx := loadPair(r.avail)
	n := idx - r.lastAvail
	if uint32(n) > r.num {
		return 0, r.broken("%d chains available in a ring of %d", n, r.num)
	}
	return int(n), nil
}

func (r *ring) broken(format string, args ...any) error {
	return &RingError{Queue: r.queue, What: fmt.Sprintf(format, args...)}
}

// next takes the next chain, whose buffers must all be for writing or all for reading. The chain is valid until the
// next call. ok is false when there is none.
func (r *ring) next(writable bool) (head uint16, c *chain, ok bool, err error) {
	n, err := r.available()
	if err != nil || n == 0 {
		return 0, nil, false, err
	}
	slot := uint32(r.lastAvail) & (r.num - 1)
	head = binary.LittleEndian.Uint16(r.avail[4+2*slot:])
	c = &r.chain
	if err := r.walk(c, head, writable); err != nil {
		return 0, nil, false, err
	}
	r.lastAvail++
	return head, c, true, nil
}

func (r *ring) walk(c *chain, head uint16, writable bool) error {
	c.segs, c.total = c.store[:0], 0
	i := uint32(head)
	for count := uint32(0); ; count++ {
		if i >= r.num {
			return r.broken("descriptor %d in a table of %d", i, r.num)
		}
		if count == r.num {
			return r.broken("descriptor chain from %d is a loop", head)
		}
		d := r.desc[descLen*i : descLen*i+descLen]
		lo := uint64(le32(atomic.LoadUint32((*uint32)(unsafe.Pointer(&d[0])))))
		hi := uint64(le32(atomic.LoadUint32((*uint32)(unsafe.Pointer(&d[4])))))
		length := le32(atomic.LoadUint32((*uint32)(unsafe.Pointer(&d[8]))))
		rest := le32(atomic.LoadUint32((*uint32)(unsafe.Pointer(&d[12]))))
		flags, next := uint16(rest), uint32(rest>>16)
		if flags&descFlagIndirect != 0 {
			return r.broken("descriptor %d is indirect, which was not offered", i)
		}
		if (flags&descFlagWrite != 0) != writable {
			return r.broken("descriptor %d has the wrong direction (flags %#x)", i, flags)
		}
		if uint64(c.total)+uint64(length) > maxChainBytes {
			return r.broken("descriptor chain from %d has more than %d bytes", head, maxChainBytes)
		}
		if err := r.addBuffer(c, i, lo|hi<<32, length); err != nil {
			return err
		}
		if flags&descFlagNext == 0 {
			c.store = c.segs
			c.descs = int(count) + 1
			return nil
		}
		i = next
	}
}

// addBuffer appends a buffer, which may reach over regions that lie side by side.
func (r *ring) addBuffer(c *chain, desc uint32, addr uint64, length uint32) error {
	for length > 0 {
		b := r.mem.guest(addr, length)
		if len(b) == 0 {
			return r.broken("descriptor %d: %d bytes at %#x are outside of the guest's memory", desc, length, addr)
		}
		c.segs = append(c.segs, b)
		c.total += len(b)
		addr += uint64(len(b))
		length -= uint32(len(b))
	}
	return nil
}

// push gives the chain of the last next back to the guest, with the number of bytes written into it.
func (r *ring) push(head uint16, written int) {
	slot := uint32(r.usedIdx) & (r.num - 1)
	e := r.used[4+8*slot:]
	binary.LittleEndian.PutUint32(e, uint32(head))
	binary.LittleEndian.PutUint32(e[4:], uint32(written))
	r.usedIdx++
	r.unsignaled += r.chain.descs
}

// wantsCall reports whether the guest wants an interrupt for what was published.
func (r *ring) wantsCall() bool {
	flags, _ := loadPair(r.avail)
	return flags&availNoInterrupt == 0
}

// read copies from the front of the chain and consumes it.
func (c *chain) read(dst []byte) int {
	n := 0
	for n < len(dst) && len(c.segs) > 0 {
		k := copy(dst[n:], c.segs[0])
		n += k
		c.advance(k)
	}
	return n
}

// write is read in the other direction.
func (c *chain) write(src []byte) int {
	n := 0
	for n < len(src) && len(c.segs) > 0 {
		k := copy(c.segs[0], src[n:])
		n += k
		c.advance(k)
	}
	return n
}

// advance drops k bytes of the first segment.
func (c *chain) advance(k int) {
	c.total -= k
	if c.segs[0] = c.segs[0][k:]; len(c.segs[0]) == 0 {
		c.segs = c.segs[1:]
	}
}
