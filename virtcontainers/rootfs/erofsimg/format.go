// SPDX-License-Identifier: Apache-2.0

package erofsimg

import (
	"encoding/binary"
	"hash/crc32"
)

// The on-disk format, after fs/erofs/erofs_fs.h of Linux 6.12. All numbers are little-endian.
const (
	// BlockSize of the images that Build writes, in bytes. Every kernel mounts it whatever its page size.
	BlockSize = 4096
	blockBits = 12

	superOffset = 1024
	superSize   = 128
	magic       = 0xE0F5E1E2

	slotSize  = 32 // an inode's number is its offset in slots
	inodeSize = 64 // the extended form, which has mtime and 32-bit ids

	featureCompatChecksum = 1 << 0
	featureCompatMtime    = 1 << 1
	featureIncompatChunks = 1 << 2

	layoutPlain  = 0 // contents in consecutive blocks
	layoutInline = 2 // the same, but the last partial block follows the inode
	layoutChunks = 4 // a table of block addresses follows the inode

	noBlock = 0xFFFFFFFF // address of a hole in such a table

	direntSize      = 12
	xattrHeaderSize = 12
	xattrEntrySize  = 4
	// maxXattrBody is what the 16-bit i_xattr_icount can say.
	maxXattrBody = xattrHeaderSize + 65534*xattrEntrySize
)

// File types in directory entries.
const (
	typeRegular = 1 + iota
	typeDir
	typeChar
	typeBlock
	typeFifo
	typeSocket
	typeSymlink
)

// xattrPrefixes are longest match first. An ACL's name is nothing but its prefix.
var xattrPrefixes = [...]struct {
	prefix string
	exact  bool
	index  byte
}{
	{"system.posix_acl_access", true, 2},
	{"system.posix_acl_default", true, 3},
	{"user.", false, 1},
	{"trusted.", false, 4},
	{"security.", false, 6},
}

// superblock holds the fields of struct erofs_super_block that this package writes or looks at.
type superblock struct {
	checksum        uint32
	featureCompat   uint32
	blkSizeBits     byte
	rootNid         uint16
	inodes          uint64
	blocks          uint32
	uuid            [16]byte
	featureIncompat uint32
	extraDevices    uint16
}

// encode writes the superblock over b, which has superSize bytes of zeros. The checksum stays zero.
func (s *superblock) encode(b []byte) {
	le := binary.LittleEndian
	le.PutUint32(b[0:], magic)
	le.PutUint32(b[8:], s.featureCompat)
	b[12] = s.blkSizeBits
	le.PutUint16(b[14:], s.rootNid)
	le.PutUint64(b[16:], s.inodes)
	le.PutUint32(b[36:], s.blocks)
	copy(b[48:64], s.uuid[:])
	le.PutUint32(b[80:], s.featureIncompat)
}

// decode reads a superblock of at least superSize bytes; false means that it is none.
func (s *superblock) decode(b []byte) bool {
	le := binary.LittleEndian
	if len(b) < superSize || le.Uint32(b) != magic {
		return false
	}
	s.checksum = le.Uint32(b[4:])
	s.featureCompat = le.Uint32(b[8:])
	s.blkSizeBits = b[12]
	s.rootNid = le.Uint16(b[14:])
	s.inodes = le.Uint64(b[16:])
	s.blocks = le.Uint32(b[36:])
	copy(s.uuid[:], b[48:64])
	s.featureIncompat = le.Uint32(b[80:])
	s.extraDevices = le.Uint16(b[86:])
	return true
}

// checksum of block 0 as erofs_superblock_csum_verify computes it: CRC-32C without the final inversion, from the superblock's
// start to the block's end, its own field taken as zero.
func checksum(block []byte) uint32 {
	table := crc32.MakeTable(crc32.Castagnoli)
	crc := crc32.Update(0, table, block[superOffset:superOffset+4])
	crc = crc32.Update(crc, table, []byte{0, 0, 0, 0})
	crc = crc32.Update(crc, table, block[superOffset+8:])
	return ^crc
}
