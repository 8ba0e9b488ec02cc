// SPDX-License-Identifier: Apache-2.0

package erofsimg

import (
	"errors"
	"fmt"
	"io"
)

// Info describes an EROFS image by its superblock.
type Info struct {
	// Bytes that the image takes by its own account; a file may be longer (an appended hash tree or tar archive).
	Bytes int64
	// Inodes in the image; 0 where the writer did not count.
	Inodes uint64
	// ExtraDevices is the number of further devices that hold the contents.
	ExtraDevices int
	// UUID of the volume.
	UUID [16]byte
}

// ErrNotEROFS says that a file has no superblock of EROFS.
var ErrNotEROFS = errors.New("not an EROFS image")

// Inspect reads an image's superblock. It accepts every image a kernel could mount, from any writer; size is the file's.
func Inspect(r io.ReaderAt, size int64) (Info, error) {
	info, _, err := inspect(r, size)
	return info, err
}

// Verify checks cheaply that a file is an image that Build completed with this UUID and that all of it is there.
func Verify(r io.ReaderAt, size int64, uuid [16]byte) error {
	info, sb, err := inspect(r, size)
	if err != nil {
		return err
	}
	switch {
	case sb.blkSizeBits != blockBits || sb.featureCompat&featureCompatChecksum == 0:
		return errors.New("the image was not written by this package")
	case info.Bytes != size:
		return fmt.Errorf("the file has %d bytes, its superblock says %d", size, info.Bytes)
	case info.UUID != uuid:
		return fmt.Errorf("the volume's UUID is %x, want %x", info.UUID, uuid)
	}
	block := make([]byte, BlockSize)
	if _, err := r.ReadAt(block, 0); err != nil {
		return fmt.Errorf("read the first block: %w", err)
	}
	if got := checksum(block); got != sb.checksum {
		return fmt.Errorf("the superblock's checksum is %#08x, computed %#08x", sb.checksum, got)
	}
	return nil
}

func inspect(r io.ReaderAt, size int64) (Info, *superblock, error) {
	b := make([]byte, superSize)
	if _, err := r.ReadAt(b, superOffset); err != nil {
		if errors.Is(err, io.EOF) {
			return Info{}, nil, fmt.Errorf("%w: only %d bytes long", ErrNotEROFS, size)
		}
		return Info{}, nil, err
	}
	sb := new(superblock)
	if !sb.decode(b) {
		return Info{}, nil, fmt.Errorf("%w: no magic number at offset %d", ErrNotEROFS, superOffset)
	}
	if sb.blkSizeBits < 9 || sb.blkSizeBits > 16 {
		return Info{}, nil, fmt.Errorf("%w: block size 2^%d", ErrNotEROFS, sb.blkSizeBits)
	}
	info := Info{
		Bytes:        int64(sb.blocks) << sb.blkSizeBits,
		Inodes:       sb.inodes,
		ExtraDevices: int(sb.extraDevices),
		UUID:         sb.uuid,
	}
	if info.Bytes > size {
		return Info{}, nil, fmt.Errorf("the image is truncated: the file has %d bytes, its superblock says %d", size, info.Bytes)
	}
	return info, sb, nil
}
