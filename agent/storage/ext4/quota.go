// SPDX-License-Identifier: Apache-2.0

package ext4

import "encoding/binary"

// Of quota files of format vfsv1 (fs/quota/quotaio_v2.h, quota_tree.h).
const (
	quotaMagicProject = 0xd9c03f14
	quotaVersion      = 1    // v2r1: usage and limits have 64 bits
	quotaBlockSize    = 1024 // whatever the file system's
	quotaTreeRoot     = 1
	quotaTreeDepth    = 4 // a byte of the id for each level
	quotaLeaf         = quotaTreeRoot + quotaTreeDepth
	quotaGrace        = 7 * 24 * 60 * 60 // seconds that a soft limit may be exceeded: mke2fs's
)

// quotaHeader is struct v2_disk_dqheader and v2_disk_dqinfo.
type quotaHeader struct {
	magic, version            uint32
	spaceGrace, inodeGrace, _ uint32 // flags
	blocks, _, freeEntry      uint32 // in the file; lists' first ones, of free blocks none
}

// quotaEntry is struct v2r1_disk_dqblk.
type quotaEntry struct {
	_, _         uint32 // id, padding
	_, _, inodes uint64 // limits, none
	_, _, space  uint64 // limits in 1024 bytes, none; what is used in bytes
	_, _         uint64 // when soft limits become hard
}

// usage is what a project has.
type usage struct{ inodes, space uint64 }

// quotaFile is the quota file, in blocks of the file system, of a tree that holds project 0, and its size in bytes.
func quotaFile(zero usage) ([]byte, uint32) {
	const size = (quotaLeaf + 1) * quotaBlockSize
	b := make([]byte, quotaBlocks*blockSize)
	copy(b, encode(quotaHeader{
		magic: quotaMagicProject, version: quotaVersion, spaceGrace: quotaGrace, inodeGrace: quotaGrace,
		blocks: size / quotaBlockSize, freeEntry: quotaLeaf,
	}))
	// Each level has the numbers of the blocks below it by a byte of the id, the upper one first: here all by 0.
	for level := range quotaTreeDepth {
		binary.LittleEndian.PutUint32(b[(quotaTreeRoot+level)*quotaBlockSize:], uint32(quotaTreeRoot+level+1))
	}
	leaf := b[quotaLeaf*quotaBlockSize:]
	binary.LittleEndian.PutUint16(leaf[8:], 1) // dqdh_entries, after the links of the list of leaves with room
	copy(leaf[16:], encode(quotaEntry{inodes: zero.inodes, space: zero.space}))
	return b, size
}
