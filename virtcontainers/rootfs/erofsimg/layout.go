// SPDX-License-Identifier: Apache-2.0

package erofsimg

import (
	"fmt"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// plan is a laid-out image: block 0 with the superblock, the inodes with what is stored beside them in the order of a
// depth-first walk, then the blocks of contents in the same order.
type plan struct {
	root    *inode
	inodes  uint64
	metaEnd uint64 // bytes
	blocks  uint32
	chunks  bool
}

func layOut(root *inode) (*plan, error) {
	p := &plan{root: root, metaEnd: superOffset + superSize}
	if err := walk(root, func(n *inode) error {
		p.inodes++
		p.place(n)
		return nil
	}); err != nil {
		return nil, err
	}
	next := blocksFor(p.metaEnd)
	err := walk(root, func(n *inode) error {
		n.block = uint32(next)
		if next += uint64(n.blockCount); next >= noBlock {
			return fmt.Errorf("the image would pass %d blocks: %w", uint32(noBlock), errdefs.ErrResourceExhausted)
		}
		return nil
	})
	p.blocks = uint32(next)
	return p, err
}

// walk visits each inode once, a directory before what is in it. visit must not change the tree.
func walk(root *inode, visit func(*inode) error) error {
	seen := make(map[*inode]struct{}) // of hard links only
	var down func(*inode) error
	down = func(n *inode) error {
		if n.nlink > 1 && n.kind() != unix.S_IFDIR {
			if _, ok := seen[n]; ok {
				return nil
			}
			seen[n] = struct{}{}
		}
		if err := visit(n); err != nil {
			return err
		}
		for _, c := range n.children {
			if err := down(c.node); err != nil {
				return err
			}
		}
		return nil
	}
	return down(root)
}

// place chooses an inode's layout and its place after the ones before.
func (p *plan) place(n *inode) {
	off := alignUp(p.metaEnd, slotSize)
	if off%BlockSize+inodeSize > BlockSize {
		off = alignUp(off, BlockSize)
	}
	head := uint64(inodeSize + len(n.xattrs))
	n.blockCount = uint32(blocksFor(n.size))
	beside := uint64(0)
	switch {
	case n.sparse:
		p.chunks = true
		n.layout = layoutChunks
		n.chunkBits = chunkBits(n.size)
		beside = 4 * chunkCount(n.size, n.chunkBits)
		n.blockCount = 0
		for i := range chunkCount(n.size, n.chunkBits) {
			n.blockCount += n.chunkBlocks(i)
		}
	case n.hasContents() && n.size%BlockSize != 0:
		tail := n.size % BlockSize
		if n.kind() == unix.S_IFREG && (n.size >= BlockSize || tail > maxInlineFile) {
			break // a file's last page is cheaper to read in line with the others
		}
		start := off + head
		if start/BlockSize != (start+tail-1)/BlockSize {
			off = alignUp(off, BlockSize)
			start = off + head
		}
		if start/BlockSize == (start+tail-1)/BlockSize {
			n.layout = layoutInline
			n.blockCount--
			beside = tail
		}
	}
	n.offset = off
	p.metaEnd = off + head + beside
}

func (n *inode) hasContents() bool {
	k := n.kind()
	return k == unix.S_IFREG || k == unix.S_IFDIR || k == unix.S_IFLNK
}

// chunkBits chooses the smallest chunk, as a power of two of blocks, whose table stays bounded.
func chunkBits(size uint64) byte {
	bits := byte(0)
	for chunkCount(size, bits) > maxChunks {
		bits++
	}
	return bits
}

func chunkCount(size uint64, bits byte) uint64 {
	chunk := uint64(BlockSize) << bits
	return (size + chunk - 1) / chunk
}

// chunkBlocks returns the number of blocks stored for a chunk: none if it lies in a hole.
func (n *inode) chunkBlocks(i uint64) uint32 {
	chunk := uint64(BlockSize) << n.chunkBits
	start, end := i*chunk, min((i+1)*chunk, n.size)
	// Extents are in order: find the first that ends after the chunk's start.
	lo, hi := 0, len(n.extents)
	for lo < hi {
		if mid := (lo + hi) / 2; n.extents[mid].end > start {
			hi = mid
		} else {
			lo = mid + 1
		}
	}
	if lo == len(n.extents) || n.extents[lo].start >= end {
		return 0
	}
	return uint32(blocksFor(end - start))
}

// direntsSize is the length of a directory's contents: entries never cross a block.
func direntsSize(dir *inode) (uint64, error) {
	size := uint64(0)
	err := direntBlocks(dir, func(block []dirent, used int, last bool) error {
		if last {
			size += uint64(used)
		} else {
			size += BlockSize
		}
		return nil
	})
	return size, err
}

// direntBlocks cuts a directory's entries into blocks. "." and ".." sort among the others by their bytes.
func direntBlocks(dir *inode, block func(entries []dirent, used int, last bool) error) error {
	all := make([]dirent, 0, len(dir.children)+2)
	dots := []dirent{{".", dir}, {"..", dir.parent}}
	for _, c := range dir.children {
		for len(dots) > 0 && dots[0].name < c.name {
			all, dots = append(all, dots[0]), dots[1:]
		}
		all = append(all, c)
	}
	all = append(all, dots...)
	start, used := 0, 0
	for i, d := range all {
		if len(d.name) > 255 {
			return fmt.Errorf("a name of %d bytes: %w", len(d.name), errdefs.ErrInvalidArgument)
		}
		need := direntSize + len(d.name)
		if used+need > BlockSize {
			if err := block(all[start:i], used, false); err != nil {
				return err
			}
			start, used = i, 0
		}
		used += need
	}
	return block(all[start:], used, true)
}

func alignUp(n, to uint64) uint64 { return (n + to - 1) / to * to }

func blocksFor(bytes uint64) uint64 { return (bytes + BlockSize - 1) / BlockSize }
