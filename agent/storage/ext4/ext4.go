// SPDX-License-Identifier: Apache-2.0

package ext4

import (
	"fmt"
	"io"
	"math"
	"strings"
	"time"

	"github.com/containerd/errdefs"
)

// Limits of the size of a device, bytes. The smallest one has hardly room for anything; block numbers have 32 bits.
const (
	MinSize = 1 << 20
	MaxSize = 16 << 40
)

const (
	blockSize = 4096
	// maxLabel is the size of s_volume_name, bytes.
	maxLabel = 16
	// Bounds of Options.InodeRatio: an inode for each block, and mke2fs's own.
	minInodeRatio     = blockSize
	maxInodeRatio     = 64 << 20
	defaultInodeRatio = 16384
	defaultRootMode   = 0o755
	// maxTime is the last second that an inode can hold: 34 bits since 1970, less the part that is for before (2446-05-10).
	maxTime = 1<<34 - 1<<31 - 1
)

// Options say what a file system is like. The same options and size give the same bytes.
type Options struct {
	// UUID is the file system's, and the seed of all its checksums. It must not be zero.
	UUID [16]byte
	// HashSeed is the secret of directories' hashes. Without it whoever names files can make names collide.
	HashSeed [16]byte
	// Label is the volume's name, at most 16 bytes; empty for none.
	Label string
	// Now is when the file system was made, in whole seconds, 1970 to 2446; the zero time is the start of 1970.
	Now time.Time
	// Zeroed says that the device reads as zeros wherever it was never written, as a sparse file does. Then inode tables are
	// neither written here nor by the kernel; else the kernel writes them, in the background once it is mounted.
	Zeroed bool
	// ProjectQuota adds the features quota and project and the quota file of projects, see the package's comment.
	ProjectQuota bool
	// RootMode is the mode of the root directory, permission bits and up to 0o7777; 0 is 0o755.
	RootMode uint32
	// RootUID and RootGID own the root directory.
	RootUID, RootGID uint32
	// InodeRatio is how many bytes of the device there are for each inode, 4096 to 64 MiB; 0 is 16384, as mke2fs has it. Each
	// inode takes 256 bytes from what files can use.
	InodeRatio int64
}

// Format makes an empty file system with the directory lost+found on a device of size bytes, a multiple of 4096 from MinSize
// to MaxSize. A last group that is hardly larger than its metadata is left out, as with mke2fs: about 2 MiB at most at the
// usual InodeRatio. Format writes well below 1 MiB for sizes up to 100 GiB, in few pieces; most of what it writes to larger devices
// are copies of the group descriptors. It neither reads nor syncs the device, nor discards what is on it.
//
// The error is errdefs.ErrInvalidArgument for a size or options that do not fit, else what dev returned.
func Format(dev io.WriterAt, size int64, o Options) error {
	if err := checkSize(size); err != nil {
		return fmt.Errorf("format ext4: %w", err)
	}
	if err := o.complete(); err != nil {
		return fmt.Errorf("format ext4: %w", err)
	}
	f := &formatter{Options: o, layout: newLayout(size, o), dev: dev, seed: crc32c(math.MaxUint32, o.UUID[:])}
	if err := f.write(); err != nil {
		return fmt.Errorf("format ext4: %w", err)
	}
	return nil
}

func checkSize(size int64) error {
	switch {
	case size < MinSize:
		return fmt.Errorf("device of %d bytes is smaller than %d: %w", size, MinSize, errdefs.ErrInvalidArgument)
	case size > MaxSize:
		return fmt.Errorf("device of %d bytes is larger than %d: %w", size, int64(MaxSize), errdefs.ErrInvalidArgument)
	case size%blockSize != 0:
		return fmt.Errorf("device of %d bytes, not a multiple of %d: %w", size, blockSize, errdefs.ErrInvalidArgument)
	}
	return nil
}

// complete checks options and sets those that have defaults.
func (o *Options) complete() error {
	if o.Now.IsZero() {
		o.Now = time.Unix(0, 0)
	}
	if o.RootMode == 0 {
		o.RootMode = defaultRootMode
	}
	if o.InodeRatio == 0 {
		o.InodeRatio = defaultInodeRatio
	}
	switch {
	case o.UUID == [16]byte{}:
		return fmt.Errorf("no UUID: %w", errdefs.ErrInvalidArgument)
	case len(o.Label) > maxLabel || strings.ContainsRune(o.Label, 0):
		return fmt.Errorf("label %.40q is not up to %d bytes without NUL: %w", o.Label, maxLabel, errdefs.ErrInvalidArgument)
	case o.Now.Unix() < 0 || o.Now.Unix() > maxTime:
		return fmt.Errorf("time %v is not within 1970 to 2446: %w", o.Now, errdefs.ErrInvalidArgument)
	case o.RootMode&^0o7777 != 0:
		return fmt.Errorf("mode %#o of the root directory is more than permission bits: %w", o.RootMode, errdefs.ErrInvalidArgument)
	case o.RootUID == math.MaxUint32 || o.RootGID == math.MaxUint32:
		return fmt.Errorf("owner %d:%d of the root directory: %w", o.RootUID, o.RootGID, errdefs.ErrInvalidArgument)
	case o.InodeRatio < minInodeRatio || o.InodeRatio > maxInodeRatio:
		return fmt.Errorf("an inode for each %d bytes, not %d to %d: %w", o.InodeRatio, minInodeRatio, maxInodeRatio,
			errdefs.ErrInvalidArgument)
	}
	return nil
}

// formatter is one call of Format.
type formatter struct {
	Options
	*layout
	dev io.WriterAt
	// seed is the checksum of the UUID, with which most checksums begin (s_checksum_seed, if it were stored).
	seed uint32
}

func (f *formatter) write() error {
	if err := f.writeFiles(); err != nil {
		return err
	}
	descriptors, free, err := f.writeBitmaps()
	if err != nil {
		return err
	}
	sb := f.superblock(free)
	for g := f.groups - 1; g > 0; g-- {
		if hasSuper(g) {
			if err := f.writeBlocks(g*blocksPerGroup, append(sb.block(g), descriptors...)); err != nil {
				return err
			}
		}
	}
	if err := f.writeBlocks(1, descriptors); err != nil {
		return err
	}
	return f.writeBlocks(0, sb.block(0))
}

func (f *formatter) writeBlocks(first int64, b []byte) error {
	if _, err := f.dev.WriteAt(b, first*blockSize); err != nil {
		return fmt.Errorf("write %d bytes at block %d: %w", len(b), first, err)
	}
	return nil
}
