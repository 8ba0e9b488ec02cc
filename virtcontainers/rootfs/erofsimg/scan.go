// SPDX-License-Identifier: Apache-2.0

package erofsimg

import (
	"context"
	"errors"
	"fmt"
	"sort"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// inode of the tree, and where it goes in the image.
type inode struct {
	mode       uint32
	uid, gid   uint32
	nlink      uint32
	rdev       uint32
	size       uint64 // of the contents as stored: for a directory, of its entries
	mtime      int64
	mtimeNsec  uint32
	dev, ino   uint64 // at the source, to notice a change between the two walks
	xattrs     []byte // encoded, header included; nil if there are none
	target     string // of a symbolic link
	children   []dirent
	parent     *inode
	extents    []extent // of a sparse file
	sparse     bool
	written    bool
	layout     byte
	chunkBits  byte
	offset     uint64 // of the inode in the image, in bytes
	block      uint32 // first block of the contents
	blockCount uint32
}

// dirent is a name in a directory. Hard links share the inode.
type dirent struct {
	name string
	node *inode
}

// extent is a range of a sparse file that holds data.
type extent struct{ start, end uint64 }

func (n *inode) kind() uint32 { return n.mode & unix.S_IFMT }

type fileID struct{ dev, ino uint64 }

// scanner collects the metadata of a tree. The calling thread's working directory follows the walk.
type scanner struct {
	opts  Options
	links map[fileID]*inode
	count int
	buf   []byte
}

// scan collects the directory open as fd, which stays open, and everything below.
func (s *scanner) scan(ctx context.Context, fd int) (*inode, error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR {
		return nil, fmt.Errorf("the root of the tree is not a directory: %w", errdefs.ErrInvalidArgument)
	}
	if err := unix.Fchdir(fd); err != nil {
		return nil, err
	}
	root, err := s.node(".", &st)
	if err != nil {
		return nil, err
	}
	root.parent = root
	return root, s.dir(ctx, fd, root, 0)
}

func (s *scanner) node(name string, st *unix.Stat_t) (*inode, error) {
	if s.count++; s.count > s.opts.MaxInodes {
		return nil, fmt.Errorf("more than %d files: %w", s.opts.MaxInodes, errdefs.ErrResourceExhausted)
	}
	n := &inode{
		mode: st.Mode, uid: st.Uid, gid: st.Gid, nlink: 1,
		mtime: st.Mtim.Sec, mtimeNsec: uint32(st.Mtim.Nsec),
		dev: st.Dev, ino: st.Ino,
	}
	var err error
	if n.xattrs, err = s.xattrs(name); err != nil {
		return nil, fmt.Errorf("extended attributes: %w", err)
	}
	switch n.kind() {
	case unix.S_IFREG:
		n.size = uint64(st.Size)
		// Blocks are of 512 bytes. Compression has the same look as holes, so look closer before believing it.
		if st.Size >= minSparse && st.Blocks*512+BlockSize <= st.Size {
			if n.extents, n.sparse, err = dataExtents(name, n.size); err != nil {
				return nil, fmt.Errorf("look for holes: %w", err)
			}
		}
	case unix.S_IFLNK:
		if n.target, err = readlink(name); err != nil {
			return nil, err
		}
		n.size = uint64(len(n.target))
	case unix.S_IFCHR, unix.S_IFBLK:
		n.rdev = encodeDev(st.Rdev)
	case unix.S_IFDIR, unix.S_IFIFO, unix.S_IFSOCK:
	default:
		return nil, fmt.Errorf("file type %#o: %w", n.kind(), errdefs.ErrNotImplemented)
	}
	return n, nil
}

func (s *scanner) dir(ctx context.Context, fd int, dir *inode, depth int) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if depth > maxDepth {
		return fmt.Errorf("directories are nested more than %d deep: %w", maxDepth, errdefs.ErrResourceExhausted)
	}
	names, err := s.readdir(fd)
	if err != nil {
		return fmt.Errorf("read directory: %w", err)
	}
	dir.nlink = 2
	for _, name := range names {
		if err := s.entry(ctx, fd, dir, name, depth); err != nil {
			return below(name, err)
		}
	}
	dir.size, err = direntsSize(dir)
	return err
}

func (s *scanner) entry(ctx context.Context, fd int, dir *inode, name string, depth int) error {
	var st unix.Stat_t
	if err := unix.Fstatat(fd, name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		// Overlayfs lists a whiteout in a directory that only one layer has, although it cannot be looked up.
		if errors.Is(err, unix.ENOENT) {
			return nil
		}
		return err
	}
	kind := st.Mode & unix.S_IFMT
	if !s.opts.KeepOverlay && kind == unix.S_IFCHR && st.Rdev == 0 {
		return nil // a whiteout with nothing below it
	}
	id := fileID{st.Dev, st.Ino}
	if kind != unix.S_IFDIR && st.Nlink > 1 {
		if n := s.links[id]; n != nil {
			n.nlink++
			dir.children = append(dir.children, dirent{name, n})
			return nil
		}
	}
	n, err := s.node(name, &st)
	if err != nil {
		return err
	}
	dir.children = append(dir.children, dirent{name, n})
	if kind != unix.S_IFDIR {
		if st.Nlink > 1 {
			s.links[id] = n
		}
		return nil
	}
	n.parent = dir
	dir.nlink++
	sub, err := openBeneath(fd, name, unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return err
	}
	defer unix.Close(sub)
	if err := unix.Fchdir(sub); err != nil {
		return err
	}
	if err := s.dir(ctx, sub, n, depth+1); err != nil {
		return err
	}
	return unix.Fchdir(fd)
}

// readdir returns the names in a directory, sorted as bytes, which is the order EROFS searches in.
func (s *scanner) readdir(fd int) ([]string, error) {
	var names []string
	for {
		n, err := unix.ReadDirent(fd, s.buf)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return nil, err
		}
		if n <= 0 {
			break
		}
		_, _, names = unix.ParseDirent(s.buf[:n], -1, names)
	}
	sort.Strings(names)
	return names, nil
}

// openBeneath opens one path element, never through a symbolic link nor into another mount.
func openBeneath(dir int, name string, flags int) (int, error) {
	how := unix.OpenHow{
		Flags:   uint64(flags | unix.O_CLOEXEC | unix.O_NOFOLLOW | unix.O_NONBLOCK | unix.O_NOCTTY | unix.O_NOATIME),
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_XDEV,
	}
	for {
		fd, err := unix.Openat2(dir, name, &how)
		switch {
		case errors.Is(err, unix.EINTR), errors.Is(err, unix.EAGAIN):
			continue
		case errors.Is(err, unix.EPERM) && how.Flags&unix.O_NOATIME != 0:
			how.Flags &^= unix.O_NOATIME
			continue
		case errors.Is(err, unix.EXDEV):
			return -1, fmt.Errorf("something is mounted here: %w: %w", err, errdefs.ErrInvalidArgument)
		}
		return fd, err
	}
}

func readlink(name string) (string, error) {
	buf := make([]byte, 256)
	for {
		n, err := unix.Readlink(name, buf)
		if err != nil {
			return "", err
		}
		if n < len(buf) {
			return string(buf[:n]), nil
		}
		if len(buf) > unix.PathMax {
			return "", unix.ENAMETOOLONG
		}
		buf = make([]byte, 2*len(buf))
	}
}

// dataExtents maps the data of a file with holes. False means that there are none, or that the filesystem cannot tell.
func dataExtents(name string, size uint64) ([]extent, bool, error) {
	fd, err := openBeneath(unix.AT_FDCWD, name, unix.O_RDONLY)
	if err != nil {
		return nil, false, err
	}
	defer unix.Close(fd)
	var all []extent
	for pos := int64(0); uint64(pos) < size; {
		start, err := unix.Seek(fd, pos, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			break
		}
		if err != nil {
			return nil, false, nil // not supported: store it in full
		}
		end, err := unix.Seek(fd, start, unix.SEEK_HOLE)
		if err != nil || end <= start {
			return nil, false, nil
		}
		if all = append(all, extent{uint64(start), min(uint64(end), size)}); len(all) > maxExtents {
			return nil, false, nil
		}
		pos = end
	}
	if len(all) == 1 && all[0].start == 0 && all[0].end >= size {
		return nil, false, nil
	}
	return all, true, nil
}

// encodeDev is the kernel's new_encode_dev, the form in which EROFS keeps device numbers.
func encodeDev(dev uint64) uint32 {
	major, minor := unix.Major(dev), unix.Minor(dev)
	return minor&0xff | major<<8 | (minor&^0xff)<<12
}
