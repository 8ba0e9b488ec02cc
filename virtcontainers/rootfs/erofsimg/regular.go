// SPDX-License-Identifier: Apache-2.0

package erofsimg

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// regular copies the contents of a file to its blocks, or beside its inode.
func (w *writer) regular(dir int, name string, n *inode) error {
	if n.size == 0 {
		return nil
	}
	if err := w.ctx.Err(); err != nil {
		return err
	}
	fd, err := openBeneath(dir, name, unix.O_RDONLY)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	if st.Dev != n.dev || st.Ino != n.ino || uint64(st.Size) != n.size || st.Mtim.Sec != n.mtime || uint32(st.Mtim.Nsec) != n.mtimeNsec {
		return errChanged
	}
	switch n.layout {
	case layoutInline:
		data := w.buf[:n.size]
		if err := readFull(fd, data, 0); err != nil {
			return err
		}
		return w.contents(n, data)
	case layoutChunks:
		return w.chunks(fd, n)
	}
	return w.copy(fd, 0, n.size, int64(n.block)*BlockSize)
}

var errChanged = fmt.Errorf("the file was changed while it was read: %w", errdefs.ErrUnavailable)

// chunks writes a sparse file's table of blocks and its data.
func (w *writer) chunks(fd int, n *inode) error {
	chunk := uint64(BlockSize) << n.chunkBits
	next := n.block
	var address [4]byte
	for i := range chunkCount(n.size, n.chunkBits) {
		blocks := n.chunkBlocks(i)
		at := uint32(noBlock)
		if blocks > 0 {
			at = next
			next += blocks
			if err := w.copy(fd, i*chunk, min(chunk, n.size-i*chunk), int64(at)*BlockSize); err != nil {
				return err
			}
		}
		binary.LittleEndian.PutUint32(address[:], at)
		if err := w.put(address[:]); err != nil {
			return err
		}
	}
	return nil
}

// copy moves length bytes at offset from of a file to offset to of the image.
func (w *writer) copy(fd int, from, length uint64, to int64) error {
	for length > 0 {
		if err := w.ctx.Err(); err != nil {
			return err
		}
		data := w.buf[:min(length, uint64(len(w.buf)))]
		if err := readFull(fd, data, int64(from)); err != nil {
			return err
		}
		if _, err := w.out.WriteAt(data, to); err != nil {
			return err
		}
		from += uint64(len(data))
		to += int64(len(data))
		length -= uint64(len(data))
	}
	return nil
}

func readFull(fd int, b []byte, offset int64) error {
	for len(b) > 0 {
		n, err := unix.Pread(fd, b, offset)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return err
		}
		if n == 0 {
			return errChanged
		}
		b = b[n:]
		offset += int64(n)
	}
	return nil
}
