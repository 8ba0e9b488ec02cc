// SPDX-License-Identifier: Apache-2.0

package ext4

import "math"

const (
	// blocksPerGroup is how many blocks one block of bitmap counts.
	blocksPerGroup = 8 * blockSize
	inodeSize      = 256
	inodesPerBlock = blockSize / inodeSize
	// spareBlocks is what a last group must have beside its metadata to be worth it: mke2fs's number.
	spareBlocks = 50

	rootBlocks      = 1
	lostFoundBlocks = 4 // e2fsck does not make it larger
	quotaBlocks     = 2
)

// extent is a run of blocks, all of one use.
type extent struct{ first, blocks int64 }

func (e extent) end() int64 { return e.first + e.blocks }

// layout says what is where. All numbers are of blocks if nothing else is said.
type layout struct {
	blocks, groups int64
	// descriptorBlocks follow each superblock.
	descriptorBlocks int64
	inodesPerGroup   int64 // in inodes
	tableBlocks      int64 // of one group's inode table

	// By group; tables begin there.
	blockBitmaps, inodeBitmaps, tables []int64
	root, lostFound, quota             extent

	// overhead is the number of blocks that are no file's or directory's.
	overhead int64
	// used are all blocks in use but superblocks and descriptors, in order and not adjacent.
	used []extent
	next int64 // where allocate goes on
}

func newLayout(size int64, o Options) *layout {
	l := &layout{blocks: min(size/blockSize, math.MaxUint32)}
	l.divide(o.InodeRatio)
	if rest := l.blocks % blocksPerGroup; rest != 0 && l.groups > 1 {
		if last := l.groups - 1; rest < l.superBlocks(last)+2+l.tableBlocks+spareBlocks {
			l.blocks -= rest
			l.divide(o.InodeRatio)
		}
	}

	l.next = l.superBlocks(0)
	for _, places := range []struct {
		of     *[]int64
		blocks int64
	}{{&l.blockBitmaps, 1}, {&l.inodeBitmaps, 1}, {&l.tables, l.tableBlocks}} {
		*places.of = make([]int64, l.groups)
		for g := range *places.of {
			(*places.of)[g] = l.allocate(places.blocks).first
		}
	}
	l.overhead = l.groups * (2 + l.tableBlocks)
	for g := range l.groups {
		l.overhead += l.superBlocks(g)
	}
	l.root, l.lostFound = l.allocate(rootBlocks), l.allocate(lostFoundBlocks)
	if o.ProjectQuota {
		l.quota = l.allocate(quotaBlocks)
	}
	return l
}

// divide makes groups of the blocks and gives them inodes.
func (l *layout) divide(inodeRatio int64) {
	l.groups = divideUp(l.blocks, blocksPerGroup)
	l.descriptorBlocks = divideUp(l.groups*descriptorSize, blockSize)
	// A table is full of inodes to its last block; one block of bitmap counts them, and a number of 32 bits all together.
	tables := divideUp(divideUp(l.blocks*blockSize/inodeRatio, l.groups), inodesPerBlock)
	l.tableBlocks = min(max(tables, 1), 8*blockSize/inodesPerBlock, math.MaxUint32/l.groups/inodesPerBlock)
	l.inodesPerGroup = l.tableBlocks * inodesPerBlock
}

func divideUp(a, b int64) int64 { return (a + b - 1) / b }

// hasSuper reports whether a group begins with a copy of the superblock and the descriptors (sparse_super).
func hasSuper(group int64) bool {
	if group <= 1 {
		return true
	}
	for _, base := range []int64{3, 5, 7} {
		power := base
		for power < group {
			power *= base
		}
		if power == group {
			return true
		}
	}
	return false
}

// superBlocks is how many blocks of a group are a superblock and descriptors.
func (l *layout) superBlocks(group int64) int64 {
	if !hasSuper(group) {
		return 0
	}
	return 1 + l.descriptorBlocks
}

// group is a group's place.
func (l *layout) group(g int64) extent {
	first := g * blocksPerGroup
	return extent{first, min(blocksPerGroup, l.blocks-first)}
}

// allocate takes the next blocks that are contiguous between copies of the superblock. There are always enough: metadata is
// not more than a tenth of a file system.
func (l *layout) allocate(blocks int64) extent {
	e := extent{l.next, blocks}
	for g := e.first / blocksPerGroup; g*blocksPerGroup < e.end(); g++ {
		super := extent{g * blocksPerGroup, l.superBlocks(g)}
		if super.blocks > 0 && e.first < super.end() && super.first < e.end() {
			e.first = super.end()
		}
	}
	l.next = e.end()
	if last := len(l.used) - 1; last >= 0 && l.used[last].end() == e.first {
		l.used[last].blocks += blocks
	} else {
		l.used = append(l.used, e)
	}
	return e
}

// usedIn returns what is in use of a group's blocks, counted from the group's first one and without the superblock and
// descriptors that it may begin with.
func (l *layout) usedIn(g int64) (out []extent) {
	group := l.group(g)
	if group.first >= l.next {
		return nil
	}
	for _, u := range l.used {
		if first, end := max(u.first, group.first), min(u.end(), group.end()); first < end {
			out = append(out, extent{first - group.first, end - first})
		}
	}
	return out
}
