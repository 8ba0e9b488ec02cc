// SPDX-License-Identifier: Apache-2.0

package erofsimg

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// Limits of a tree. They bound the memory that a build takes.
const (
	// DefaultMaxInodes keeps a build below about 1 GiB of memory.
	DefaultMaxInodes = 4 << 20

	maxDepth      = 2048    // what fits into PATH_MAX
	maxExtents    = 1 << 16 // of one sparse file; above it is stored in full
	maxChunks     = 1 << 16 // of one sparse file; chunks grow with it
	minSparse     = 64 << 10
	maxInlineFile = 2048
	copyBuffer    = 256 << 10
	metaBuffer    = 256 << 10
)

// Options of Build.
type Options struct {
	// UUID of the volume.
	UUID [16]byte
	// KeepOverlay keeps whiteouts and opaque marks: the tree is the upper directory of an overlay and becomes a layer over
	// others. Otherwise both are left out.
	KeepOverlay bool
	// UserXattr says that the overlay's marks are attributes user.overlay.*, not trusted.overlay.*.
	UserXattr bool
	// MaxInodes bounds the number of files; 0 means DefaultMaxInodes.
	MaxInodes int
}

// Build writes the directory open as dirfd, and everything below it, as an EROFS image over the empty file out.
//
// It changes the working directory of the calling thread, at the end to "/" so that the tree is not kept busy: call it on a locked
// OS thread that does not share its filesystem attributes (unshare CLONE_FS). The caller syncs out. Errors: ErrNeedsMerge,
// errdefs.ErrUnavailable if a file changes
// meanwhile, errdefs.ErrResourceExhausted if a limit is passed, and those of the system calls with the path in the tree.
func Build(ctx context.Context, dirfd int, out *os.File, opts Options) (Info, error) {
	if opts.MaxInodes == 0 {
		opts.MaxInodes = DefaultMaxInodes
	}
	defer func() { _ = unix.Chdir("/") }()
	s := scanner{opts: opts, links: make(map[fileID]*inode), buf: make([]byte, 64<<10)}
	root, err := s.scan(ctx, dirfd)
	if err != nil {
		return Info{}, described(err)
	}
	p, err := layOut(root)
	if err != nil {
		return Info{}, err
	}
	total := int64(p.blocks) * BlockSize
	// Reserve all of it first: a full disk is found out before the work. Not every filesystem can.
	err = unix.Fallocate(int(out.Fd()), 0, 0, total)
	if err != nil && !errors.Is(err, unix.EOPNOTSUPP) && !errors.Is(err, unix.ENOSYS) && !errors.Is(err, unix.EINTR) {
		return Info{}, fmt.Errorf("reserve %d bytes: %w", total, err)
	}
	if err := out.Truncate(total); err != nil {
		return Info{}, err
	}
	w := writer{ctx: ctx, out: out, buf: make([]byte, copyBuffer)}
	if err := w.image(dirfd, p, opts); err != nil {
		return Info{}, described(err)
	}
	return Info{Bytes: total, Inodes: p.inodes, UUID: opts.UUID}, nil
}

// pathError collects the path of an error while it comes up through the walk, which itself keeps no paths.
type pathError struct {
	names []string // innermost first
	err   error
}

func below(name string, err error) error {
	var p *pathError
	if errors.As(err, &p) {
		p.names = append(p.names, name)
		return err
	}
	return &pathError{[]string{name}, err}
}

func (p *pathError) Unwrap() error { return p.err }

func (p *pathError) Error() string {
	var b strings.Builder
	for i := len(p.names) - 1; i >= 0; i-- {
		b.WriteString("/")
		b.WriteString(p.names[i])
	}
	return fmt.Sprintf("%q: %v", b.String(), p.err)
}

func described(err error) error { return fmt.Errorf("build an EROFS image: %w", err) }

// writer fills the image. meta is written in order through a buffer, contents go straight to their blocks.
type writer struct {
	ctx     context.Context
	out     *os.File
	meta    []byte
	metaOff int64 // of meta's first byte
	buf     []byte
}

func (w *writer) image(dirfd int, p *plan, opts Options) error {
	sb := superblock{
		featureCompat: featureCompatChecksum | featureCompatMtime,
		blkSizeBits:   blockBits,
		rootNid:       uint16(p.root.offset / slotSize),
		inodes:        p.inodes,
		blocks:        p.blocks,
		uuid:          opts.UUID,
	}
	if p.chunks {
		sb.featureIncompat |= featureIncompatChunks
	}
	w.meta = make([]byte, superOffset+superSize, metaBuffer)
	sb.encode(w.meta[superOffset:])
	if err := unix.Fchdir(dirfd); err != nil {
		return err
	}
	if err := w.node(dirfd, "", p.root); err != nil {
		return err
	}
	if err := w.flush(); err != nil {
		return err
	}
	first := make([]byte, BlockSize)
	if _, err := w.out.ReadAt(first, 0); err != nil {
		return err
	}
	var sum [4]byte
	binary.LittleEndian.PutUint32(sum[:], checksum(first))
	_, err := w.out.WriteAt(sum[:], superOffset+4)
	return err
}

// node writes an inode and what belongs to it; the file is called name in the directory open as dir.
func (w *writer) node(dir int, name string, n *inode) error {
	if n.written {
		return nil
	}
	n.written = true
	if err := w.inode(n); err != nil {
		return err
	}
	switch n.kind() {
	case unix.S_IFREG:
		return w.regular(dir, name, n)
	case unix.S_IFLNK:
		return w.contents(n, []byte(n.target))
	case unix.S_IFDIR:
		return w.dir(dir, name, n)
	}
	return nil
}

func (w *writer) inode(n *inode) error {
	if err := w.seek(n.offset); err != nil {
		return err
	}
	var b [inodeSize]byte
	le := binary.LittleEndian
	le.PutUint16(b[0:], 1|uint16(n.layout)<<1)
	if n.xattrs != nil {
		le.PutUint16(b[2:], uint16((len(n.xattrs)-xattrHeaderSize)/xattrEntrySize+1))
	}
	le.PutUint16(b[4:], uint16(n.mode))
	le.PutUint64(b[8:], n.size)
	switch {
	case n.layout == layoutChunks:
		le.PutUint32(b[16:], uint32(n.chunkBits))
	case n.kind() == unix.S_IFCHR || n.kind() == unix.S_IFBLK:
		le.PutUint32(b[16:], n.rdev)
	case n.blockCount > 0:
		le.PutUint32(b[16:], n.block)
	}
	le.PutUint32(b[20:], uint32(n.offset/slotSize)) // i_ino: what a 32-bit stat shows
	le.PutUint32(b[24:], n.uid)
	le.PutUint32(b[28:], n.gid)
	le.PutUint64(b[32:], uint64(n.mtime))
	le.PutUint32(b[40:], n.mtimeNsec)
	le.PutUint32(b[44:], n.nlink)
	if err := w.put(b[:]); err != nil {
		return err
	}
	return w.put(n.xattrs)
}

// contents writes the whole contents of a small inode that is in memory.
func (w *writer) contents(n *inode, data []byte) error {
	full := int(n.blockCount) * BlockSize
	if n.layout != layoutInline {
		full = len(data)
	}
	if full > 0 {
		if _, err := w.out.WriteAt(data[:full], int64(n.block)*BlockSize); err != nil {
			return err
		}
	}
	return w.put(data[full:])
}

func (w *writer) dir(parent int, name string, n *inode) error {
	data := make([]byte, 0, n.size)
	if err := direntBlocks(n, func(entries []dirent, _ int, last bool) error {
		start := len(data)
		offset := len(entries) * direntSize
		le := binary.LittleEndian
		for _, d := range entries {
			data = le.AppendUint64(data, d.node.offset/slotSize)
			data = le.AppendUint16(data, uint16(offset))
			data = append(data, fileType(d.node.mode), 0)
			offset += len(d.name)
		}
		for _, d := range entries {
			data = append(data, d.name...)
		}
		if pad := BlockSize - (len(data) - start); !last && pad > 0 {
			data = append(data, make([]byte, pad)...)
		}
		return nil
	}); err != nil {
		return err
	}
	if err := w.contents(n, data); err != nil {
		return err
	}
	if err := w.ctx.Err(); err != nil {
		return err
	}
	fd := parent
	if name != "" {
		var err error
		if fd, err = openBeneath(parent, name, unix.O_RDONLY|unix.O_DIRECTORY); err != nil {
			return err
		}
		defer unix.Close(fd)
	}
	for _, c := range n.children {
		if err := w.node(fd, c.name, c.node); err != nil {
			return below(c.name, err)
		}
	}
	return nil
}

// seek moves the metadata forward to an offset in the image, over zeros.
func (w *writer) seek(offset uint64) error {
	gap := int64(offset) - w.metaOff - int64(len(w.meta))
	if gap < 0 || gap > 2*BlockSize+4*maxChunks {
		return fmt.Errorf("the image's layout is broken: gap of %d bytes before offset %d", gap, offset)
	}
	return w.put(make([]byte, gap))
}

func (w *writer) put(b []byte) error {
	for len(b) > 0 {
		if len(w.meta) == cap(w.meta) {
			if err := w.flush(); err != nil {
				return err
			}
		}
		n := min(len(b), cap(w.meta)-len(w.meta))
		w.meta = append(w.meta, b[:n]...)
		b = b[n:]
	}
	return nil
}

func (w *writer) flush() error {
	_, err := w.out.WriteAt(w.meta, w.metaOff)
	w.metaOff += int64(len(w.meta))
	w.meta = w.meta[:0]
	return err
}

func fileType(mode uint32) byte {
	switch mode & unix.S_IFMT {
	case unix.S_IFREG:
		return typeRegular
	case unix.S_IFDIR:
		return typeDir
	case unix.S_IFCHR:
		return typeChar
	case unix.S_IFBLK:
		return typeBlock
	case unix.S_IFIFO:
		return typeFifo
	case unix.S_IFSOCK:
		return typeSocket
	case unix.S_IFLNK:
		return typeSymlink
	}
	return 0
}
