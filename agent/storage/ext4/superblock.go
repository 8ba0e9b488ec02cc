// SPDX-License-Identifier: Apache-2.0

package ext4

import (
	"encoding/binary"
	"math"
)

const (
	superblockOffset = 1024 // of the primary one; copies begin their block
	superblockSize   = 1024
	superblockMagic  = 0xef53
)

// Features. A kernel that does not know one of the incompatible ones does not mount the file system, one of the read-only
// compatible ones mounts it for reading.
const (
	compatExtAttr  = 0x8
	compatDirIndex = 0x20

	incompatFiletype = 0x2
	incompatExtents  = 0x40
	incompatFlexBG   = 0x200

	roCompatSparseSuper  = 0x1
	roCompatLargeFile    = 0x2
	roCompatHugeFile     = 0x8
	roCompatDirNlink     = 0x20
	roCompatExtraIsize   = 0x40
	roCompatQuota        = 0x100
	roCompatMetadataCsum = 0x400
	roCompatProject      = 0x2000
)

// Values of the superblock's fields.
const (
	stateClean       = 1 // s_state
	errorsRemountRO  = 2 // s_errors: once found damaged, the file system is written no more
	dynamicRevision  = 1 // s_rev_level
	hashHalfMD4      = 1 // s_def_hash_version
	defaultXattrACL  = 0x4 | 0x8
	flagSignedHash   = 1 // s_flags: how names with bytes above 0x7f are hashed, on any processor
	checksumCRC32C   = 1
	logGroupsPerFlex = 4      // 16 groups; the kernel spreads directories over such
	neverCheck       = 0xffff // s_max_mnt_count
	logBlockSize     = 2      // of blockSize, from 1024
)

// superblock is struct ext4_super_block. Here and in other structures what stays zero has no
// name, and a comment says what it is.
type superblock struct {
	inodesCount, blocksCount, _                     uint32 // reserved blocks
	freeBlocks, freeInodes, _                       uint32 // first_data_block
	logBlockSize, logClusterSize                    uint32
	blocksPerGroup, clustersPerGroup                uint32
	inodesPerGroup, _, wtime                        uint32 // mtime
	_, maxMntCount, magic, state                    uint16 // mnt_count
	errors, _                                       uint16 // minor_rev_level
	lastcheck, _, _, revLevel                       uint32 // checkinterval, creator_os: 0 is Linux
	_, _                                            uint16 // def_resuid, def_resgid
	firstIno                                        uint32
	inodeSize, blockGroupNr                         uint16
	featureCompat, featureIncompat, featureRoCompat uint32
	uuid, volumeName                                [16]byte
	_                                               [100]byte // last_mounted to last_orphan, the journal's between them
	hashSeed                                        [16]byte
	defHashVersion                                  uint8
	_                                               [3]byte // jnl_backup_type, desc_size
	defaultMountOpts, _                             uint32  // first_meta_bg
	mkfsTime                                        uint32
	_                                               [80]byte // jnl_blocks, upper halves of counts of blocks
	minExtraIsize, wantExtraIsize                   uint16
	flags                                           uint32
	_                                               [16]byte // raid_stride to raid_stripe_width
	logGroupsPerFlex, checksumType                  uint8
	_                                               [202]byte // encryption_level to mount_opts
	_, _, overheadClusters                          uint32    // usr_quota_inum, grp_quota_inum
	_                                               [32]byte  // backup_bgs to lpf_ino
	prjQuotaInum, _                                 uint32    // checksum_seed
	wtimeHi, _, mkfsTimeHi, lastcheckHi             uint8     // mtime_hi
	_                                               [388]byte
}

// superblock is the primary one without its checksum.
func (f *formatter) superblock(freeBlocks int64) superblock {
	seconds := f.Now.Unix()
	sb := superblock{
		inodesCount: uint32(f.groups * f.inodesPerGroup), blocksCount: uint32(f.blocks),
		freeBlocks: uint32(freeBlocks), freeInodes: uint32(f.groups*f.inodesPerGroup) - f.inodes(),
		logBlockSize: logBlockSize, logClusterSize: logBlockSize,
		blocksPerGroup: blocksPerGroup, clustersPerGroup: blocksPerGroup, inodesPerGroup: uint32(f.inodesPerGroup),
		wtime: uint32(seconds), mkfsTime: uint32(seconds), lastcheck: uint32(seconds),
		wtimeHi: uint8(seconds >> 32), mkfsTimeHi: uint8(seconds >> 32), lastcheckHi: uint8(seconds >> 32),
		maxMntCount: neverCheck, magic: superblockMagic, state: stateClean, errors: errorsRemountRO, revLevel: dynamicRevision,
		firstIno: firstInode, inodeSize: inodeSize,
		featureCompat:   compatExtAttr | compatDirIndex,
		featureIncompat: incompatFiletype | incompatExtents | incompatFlexBG,
		featureRoCompat: roCompatSparseSuper | roCompatLargeFile | roCompatHugeFile | roCompatDirNlink | roCompatExtraIsize |
			roCompatMetadataCsum,
		uuid: f.UUID, hashSeed: f.HashSeed, defHashVersion: hashHalfMD4, flags: flagSignedHash,
		defaultMountOpts: defaultXattrACL, minExtraIsize: extraInodeSize, wantExtraIsize: extraInodeSize,
		logGroupsPerFlex: logGroupsPerFlex, checksumType: checksumCRC32C, overheadClusters: uint32(f.overhead),
	}
	copy(sb.volumeName[:], f.Label)
	if f.ProjectQuota {
		sb.featureRoCompat |= roCompatQuota | roCompatProject
		sb.prjQuotaInum = quotaInode
	}
	return sb
}

// block is the block that begins a group, with the superblock's copy for that group.
func (sb superblock) block(group int64) []byte {
	sb.blockGroupNr = uint16(group)
	b := encode(sb)
	b = binary.LittleEndian.AppendUint32(b, crc32c(math.MaxUint32, b))
	block := make([]byte, blockSize)
	if group == 0 {
		copy(block[superblockOffset:], b)
	} else {
		copy(block, b)
	}
	return block
}
