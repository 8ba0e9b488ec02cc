// SPDX-License-Identifier: Apache-2.0

package ext4

import "encoding/binary"

// Numbers of inodes. Those before firstInode are reserved; of them only the root directory is used.
const (
	rootInode      = 2
	firstInode     = 11 // s_first_ino
	lostFoundInode = firstInode
	quotaInode     = lostFoundInode + 1
)

// Of inodes.
const (
	modeDirectory = 0o040000
	modeRegular   = 0o100000

	flagImmutable = 0x10
	flagExtents   = 0x80000

	sectorSize     = 512 // i_blocks counts those
	goodOldInode   = 128 // what all inodes have; the rest is an extra part
	extraInodeSize = 32  // and of that, what has meaning: up to i_projid
	extentMagic    = 0xf30a
	extentsInInode = 4
)

// inode is struct ext4_inode with one extent in i_block.
type inode struct {
	mode, uid                                uint16
	size, atime, ctime, mtime, _             uint32 // dtime
	gid, linksCount                          uint16
	blocks, flags, _                         uint32 // version
	extentMagic, extentEntries, extentMax, _ uint16 // the extents' header, with the tree's depth
	_                                        uint32 // its generation
	_                                        uint32 // the first block of the file that the extent has
	extentLength, _                          uint16 // upper bits of its start
	extentStart                              uint32
	_                                        [36]byte // three extents more
	_                                        [16]byte // generation, file_acl, size_high, obso_faddr
	_                                        [4]byte  // upper halves of blocks and file_acl
	uidHigh, gidHigh, checksum, _            uint16
	extraIsize, checksumHi                   uint16
	ctimeExtra, mtimeExtra, atimeExtra       uint32
	crtime, crtimeExtra                      uint32
	_                                        [8]byte // version_hi, projid
	_                                        [inodeSize - goodOldInode - extraInodeSize]byte
}

// inodes is the number of inodes in use, the first ones of the first group.
func (f *formatter) inodes() uint32 {
	if f.ProjectQuota {
		return quotaInode
	}
	return lostFoundInode
}

// writeFiles writes the directories, the quota file and their inodes.
func (f *formatter) writeFiles() error {
	table := make([]byte, blockSize)
	root := inode{
		mode: modeDirectory | uint16(f.RootMode), linksCount: 3, size: rootBlocks * blockSize, uid: uint16(f.RootUID),
		uidHigh: uint16(f.RootUID >> 16), gid: uint16(f.RootGID), gidHigh: uint16(f.RootGID >> 16),
	}
	f.putInode(table, rootInode, root, f.root)
	err := f.writeBlocks(f.root.first, f.directory(rootInode,
		entry{rootInode, "."}, entry{rootInode, ".."}, entry{lostFoundInode, "lost+found"}))
	if err != nil {
		return err
	}

	lostFound := inode{mode: modeDirectory | 0o700, linksCount: 2, size: lostFoundBlocks * blockSize}
	f.putInode(table, lostFoundInode, lostFound, f.lostFound)
	b := f.directory(lostFoundInode, entry{lostFoundInode, "."}, entry{rootInode, ".."})
	for range lostFoundBlocks - 1 {
		b = append(b, f.directory(lostFoundInode, entry{})...)
	}
	if err := f.writeBlocks(f.lostFound.first, b); err != nil {
		return err
	}

	if f.ProjectQuota {
		file, size := quotaFile(usage{inodes: 2, space: (rootBlocks + lostFoundBlocks) * blockSize})
		quota := inode{mode: modeRegular | 0o600, linksCount: 1, size: size, flags: flagImmutable}
		f.putInode(table, quotaInode, quota, f.quota)
		if err := f.writeBlocks(f.quota.first, file); err != nil {
			return err
		}
	}
	return f.writeBlocks(f.tables[0], table)
}

// putInode puts an inode into its place in the first block of the table, with what is common to all of them.
func (f *formatter) putInode(table []byte, number uint32, n inode, at extent) {
	n.flags |= flagExtents
	n.blocks = uint32(at.blocks * (blockSize / sectorSize))
	n.extentMagic, n.extentEntries, n.extentMax = extentMagic, 1, extentsInInode
	n.extentLength, n.extentStart = uint16(at.blocks), uint32(at.first)

	// Times are 32 bits with a sign and how often they ran over, in the extra part's lower two bits.
	seconds := f.Now.Unix()
	low, epoch := uint32(seconds), uint32((seconds-int64(int32(seconds)))>>32)
	n.atime, n.ctime, n.mtime, n.crtime = low, low, low, low
	n.atimeExtra, n.ctimeExtra, n.mtimeExtra, n.crtimeExtra = epoch, epoch, epoch, epoch

	n.extraIsize = extraInodeSize
	checksum := crc32c(f.inodeSeed(number), encode(n))
	n.checksum, n.checksumHi = uint16(checksum), uint16(checksum>>16)
	copy(table[(number-1)*inodeSize:], encode(n))
}

// inodeSeed is what the checksums of an inode of generation 0 and of its directory blocks begin with.
func (f *formatter) inodeSeed(number uint32) uint32 { return crc32cOf(f.seed, number, 0) }

// entry is a directory's name of another directory.
type entry struct {
	inode uint32 // 0 for an entry that is not used
	name  string
}

// Of directory entries (struct ext4_dir_entry_2 and, at the end of each block, ext4_dir_entry_tail).
const (
	entryHeader   = 8
	entryTail     = 12
	typeDirectory = 2
	typeChecksum  = 0xde
)

// directory is one block of a directory. The last entry has what is left of it.
func (f *formatter) directory(number uint32, entries ...entry) []byte {
	b := make([]byte, 0, blockSize)
	for i, e := range entries {
		length := (entryHeader + len(e.name) + 3) &^ 3
		if i == len(entries)-1 {
			length = blockSize - entryTail - len(b)
		}
		at := len(b)
		b = b[:at+length]
		binary.LittleEndian.PutUint32(b[at:], e.inode)
		binary.LittleEndian.PutUint16(b[at+4:], uint16(length))
		if e.inode != 0 {
			b[at+6], b[at+7] = uint8(len(e.name)), typeDirectory
			copy(b[at+entryHeader:], e.name)
		}
	}
	checksum := crc32c(f.inodeSeed(number), b)
	tail := binary.LittleEndian.AppendUint32(nil, 0)
	tail = append(tail, entryTail, 0, 0, typeChecksum)
	return append(append(b, tail...), binary.LittleEndian.AppendUint32(nil, checksum)...)
}
