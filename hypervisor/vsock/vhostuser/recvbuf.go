// SPDX-License-Identifier: Apache-2.0

package vhostuser

import "sync"

const chunkSize = 16 << 10

type chunk [chunkSize]byte

// recvBuf holds bytes that the guest sent and nobody has read yet, in chunks that come from a pool and go back as soon
// as they are read: an idle stream holds none. The caller bounds what goes in.
type recvBuf struct {
	pool   *sync.Pool // of *chunk
	chunks []*chunk
	start  int // of the data in the first chunk
	length int
}

// fill appends n bytes from a chain.
func (b *recvBuf) fill(c *chain, n int) {
	for n > 0 {
		end := b.start + b.length
		if end == len(b.chunks)*chunkSize {
			b.chunks = append(b.chunks, b.pool.Get().(*chunk))
		}
		at := end % chunkSize
		k := c.read(b.chunks[len(b.chunks)-1][at:min(chunkSize, at+n)])
		b.length += k
		n -= k
		if k == 0 {
			return
		}
	}
}

func (b *recvBuf) read(p []byte) (n int) {
	for n < len(p) && b.length > 0 {
		k := copy(p[n:], b.chunks[0][b.start:min(chunkSize, b.start+b.length)])
		n += k
		b.start += k
		b.length -= k
		if b.start == chunkSize || b.length == 0 {
			b.pool.Put(b.chunks[0])
			b.chunks[0] = nil
			b.chunks = b.chunks[1:]
			b.start = 0
		}
	}
	if b.length == 0 {
		b.drop()
	}
	return n
}

// drop discards everything.
func (b *recvBuf) drop() {
	for _, c := range b.chunks {
		b.pool.Put(c)
	}
	b.chunks, b.start, b.length = nil, 0, 0
}
