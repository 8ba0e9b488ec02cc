// SPDX-License-Identifier: Apache-2.0

package ext4

// descriptorSize is that of groupDescriptor, bytes.
const descriptorSize = 32

// bg_flags.
const (
	inodeUninit = 1 << iota // neither bitmap nor table of inodes are set up
	blockUninit             // the block bitmap is not set up
	inodeZeroed             // the inode table reads as zeros where no inode was ever
)

// groupDescriptor is struct ext4_group_desc without the 64bit feature. Of bitmaps' checksums it has the lower halves.
type groupDescriptor struct {
	blockBitmap, inodeBitmap, inodeTable     uint32
	freeBlocks, freeInodes, usedDirs, flags  uint16
	_                                        uint32 // exclude_bitmap
	blockBitmapChecksum, inodeBitmapChecksum uint16
	itableUnused                             uint16 // at the table's end
	checksum                                 uint16
}

// writeBitmaps writes the bitmaps of groups in which something is in use. It returns the descriptors of all groups, in
// whole blocks, and the number of free blocks.
func (f *formatter) writeBitmaps() (descriptors []byte, free int64, err error) {
	descriptors = make([]byte, 0, f.descriptorBlocks*blockSize)
	for g := range f.groups {
		d := groupDescriptor{
			blockBitmap: uint32(f.blockBitmaps[g]), inodeBitmap: uint32(f.inodeBitmaps[g]), inodeTable: uint32(f.tables[g]),
			freeInodes: uint16(f.inodesPerGroup), itableUnused: uint16(f.inodesPerGroup), flags: inodeUninit,
		}
		if f.Zeroed {
			d.flags |= inodeZeroed
		}
		group, used := f.group(g), f.usedIn(g)
		// The last group's bitmap says where the file system ends; e2fsck wants it to be there.
		if len(used) == 0 && g != f.groups-1 {
			d.flags |= blockUninit
		}
		used = append(used, extent{0, f.superBlocks(g)})
		left := group.blocks
		for _, u := range used {
			left -= u.blocks
		}
		d.freeBlocks = uint16(left)
		free += left
		if d.flags&blockUninit == 0 {
			b := bitmap(append(used, extent{group.blocks, blocksPerGroup - group.blocks})...)
			d.blockBitmapChecksum = uint16(crc32c(f.seed, b))
			if err := f.writeBlocks(f.blockBitmaps[g], b); err != nil {
				return nil, 0, err
			}
		}
		if g == 0 {
			inodes := int64(f.inodes())
			d.flags &^= inodeUninit
			d.freeInodes -= uint16(inodes)
			d.itableUnused -= uint16(inodes)
			d.usedDirs = 2
			b := bitmap(extent{0, inodes}, extent{f.inodesPerGroup, 8*blockSize - f.inodesPerGroup})
			d.inodeBitmapChecksum = uint16(crc32c(f.seed, b[:f.inodesPerGroup/8]))
			if err := f.writeBlocks(f.inodeBitmaps[g], b); err != nil {
				return nil, 0, err
			}
		}
		d.checksum = uint16(crc32c(crc32cOf(f.seed, uint32(g)), encode(d)))
		descriptors = append(descriptors, encode(d)...)
	}
	return descriptors[:cap(descriptors)], free, nil
}

// bitmap is a block of bits of which those in the extents are set.
func bitmap(set ...extent) []byte {
	b := make([]byte, blockSize)
	for _, e := range set {
		for i := e.first; i < e.end(); {
			if i%8 == 0 && e.end()-i >= 8 {
				b[i/8] = 0xff
				i += 8
				continue
			}
			b[i/8] |= 1 << (i % 8)
			i++
		}
	}
	return b
}
