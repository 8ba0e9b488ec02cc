// SPDX-License-Identifier: Apache-2.0

package share

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/containerd/errdefs"
	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/cloister-project/cloister/agent-protocol/wire"
	"github.com/cloister-project/cloister/internal/idmap"
)

// Access says what the guest may do with what is shared.
type Access int

// Accesses. A read-only one holds for what is asked for and not for mounts below it, as a mount's option ro; a recursive one for
// these, too (rro).
const (
	Writable Access = iota
	ReadOnly
	RecursiveReadOnly
)

// object is one thing of the host's: what tells it from all others, and where it lies.
type object struct {
	device, inode uint64
	isDir         bool
	// path is where it was found, without links.
	path string
	// filesystem and root are the file system that it is in, major:minor, and its path there.
	filesystem, root string
	// submounts are the directories below it on which others are mounted, relative, in the order of their paths.
	submounts []submount
}

// submount is a mount below an object.
type submount struct {
	path             string
	filesystem, root string
}

// look finds out what an opened path is.
func look(fd int) (object, error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return object{}, err
	}
	kind := st.Mode & unix.S_IFMT
	if kind != unix.S_IFDIR && kind != unix.S_IFREG {
		return object{}, fmt.Errorf("only directories and regular files can be shared with a VM, not a socket, pipe or device: %w",
			errdefs.ErrNotImplemented)
	}
	o := object{device: st.Dev, inode: st.Ino, isDir: kind == unix.S_IFDIR}
	var err error
	if o.path, err = os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd)); err != nil {
		return object{}, err
	}
	mounts, err := mountinfo.GetMounts(nil)
	if err != nil {
		return object{}, fmt.Errorf("mounts of the host: %w", err)
	}
	return o, o.locate(fd, mounts)
}

// locate fills in what the mounts tell.
func (o *object) locate(fd int, mounts []*mountinfo.Info) error {
	id, err := mountID(fd)
	if err != nil {
		return err
	}
	for _, m := range mounts {
		if m.ID == id {
			if rest, ok := below(m.Mountpoint, o.path); ok {
				o.filesystem, o.root = filesystemOf(m), filepath.Join(m.Root, rest)
			}
		}
		if rest, ok := below(o.path, m.Mountpoint); ok && rest != "" && o.isDir {
			o.submounts = append(o.submounts, submount{path: rest, filesystem: filesystemOf(m), root: m.Root})
		}
	}
	// The order of mounting decides what hides what, and is kept among mounts on one place.
	slices.SortStableFunc(o.submounts, func(a, b submount) int { return strings.Compare(a.path, b.path) })
	return nil
}

func filesystemOf(m *mountinfo.Info) string { return fmt.Sprintf("%d:%d", m.Major, m.Minor) }

// mountID is the number of the mount that a descriptor was opened in, as in mountinfo (proc(5), fdinfo).
func mountID(fd int) (int, error) {
	var st unix.Statx_t
	if err := unix.Statx(fd, "", unix.AT_EMPTY_PATH, unix.STATX_MNT_ID, &st); err != nil {
		return 0, fmt.Errorf("statx: %w", err)
	}
	if st.Mask&unix.STATX_MNT_ID == 0 {
		return 0, fmt.Errorf("the kernel does not tell mounts (needs Linux 5.8): %w", errdefs.ErrFailedPrecondition)
	}
	return int(st.Mnt_id), nil
}

// below returns the path that leads from directory to path, "" from a directory to itself, and whether there is one. Both are
// absolute and clean.
func below(directory, path string) (string, bool) {
	if directory == path {
		return "", true
	}
	return strings.CutPrefix(path, strings.TrimSuffix(directory, "/")+"/")
}

// same reports whether two are one object with the same mounts in it.
func (o *object) same(other *object) bool {
	return o.device == other.device && o.inode == other.inode && o.isDir == other.isDir && slices.Equal(o.submounts, other.submounts)
}

// within returns where in other, by its path there, o should be found: in the file system, or by the path on the host. It is to
// be looked up: something else may be mounted there.
func (o *object) within(other *object) []string {
	var candidates []string
	if !other.isDir {
		return nil
	}
	if rest, ok := below(other.root, o.root); ok && rest != "" && o.filesystem != "" && o.filesystem == other.filesystem {
		candidates = append(candidates, rest)
	}
	if rest, ok := below(other.path, o.path); ok && rest != "" && !slices.Contains(candidates, rest) {
		candidates = append(candidates, rest)
	}
	// Whoever sees it there sees the other's mounts in it.
	return slices.DeleteFunc(candidates, func(path string) bool {
		return !tellable(path) || !slices.Equal(o.submounts, submountsIn(other.submounts, path))
	})
}

// submountsIn returns those below a directory, relative to it.
func submountsIn(all []submount, directory string) []submount {
	var in []submount
	for _, m := range all {
		if rest, ok := strings.CutPrefix(m.path, directory+"/"); ok {
			m.path = rest
			in = append(in, m)
		}
	}
	return in
}

// submountPaths returns where further mounts are, those above others first, as many as the guest takes. Of others it learns when it
// looks into them.
func (o *object) submountPaths() []string {
	var paths []string
	room := wire.MaxSubmountPaths
	for _, m := range o.submounts {
		if len(paths) > 0 && paths[len(paths)-1] == m.path || !tellable(m.path) {
			continue
		}
		if room -= len(m.path); room < 0 || len(paths) == wire.MaxSubmounts {
			break
		}
		paths = append(paths, m.path)
	}
	return paths
}

// tellable reports whether the protocol takes a path.
func tellable(path string) bool { return len(path) <= wire.MaxSharedPath && utf8.ValidString(path) }

// foundAt reports whether a path below a directory leads to the object.
func (o *object) foundAt(dir int, path string) bool {
	fd, err := unix.Openat2(dir, path, &unix.OpenHow{
		Flags:   unix.O_PATH | unix.O_NOFOLLOW | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS,
	})
	if err != nil {
		return false
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	return unix.Fstat(fd, &st) == nil && st.Dev == o.device && st.Ino == o.inode
}

// open opens a path of the host, links followed.
func open(path string) (int, error) {
	fd, err := unix.Open(path, unix.O_PATH|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP) {
		return -1, fmt.Errorf("%w: %w", err, errdefs.ErrNotFound)
	}
	return fd, err
}

// cloneTree copies the mounts at and below what was opened, not attached anywhere. Closing the descriptor removes them.
func cloneTree(fd int, access Access) (tree int, err error) {
	tree, err = unix.OpenTree(fd, "", unix.OPEN_TREE_CLONE|unix.AT_RECURSIVE|unix.OPEN_TREE_CLOEXEC|unix.AT_EMPTY_PATH)
	if err != nil {
		return -1, fmt.Errorf("open_tree: %w", err)
	}
	if err := restrictTree(tree, access); err != nil {
		unix.Close(tree)
		return -1, err
	}
	return tree, nil
}

func restrictTree(tree int, access Access) error {
	// Nothing that happens here shows on the host, and nothing that the host mounts or unmounts later shows here: the guest
	// keeps what it knows open, and a mount that came from the host could not be unmounted there.
	attr := unix.MountAttr{Propagation: unix.MS_PRIVATE}
	if access == RecursiveReadOnly {
		attr.Attr_set = unix.MOUNT_ATTR_RDONLY
	}
	err := unix.MountSetattr(tree, "", unix.AT_EMPTY_PATH|unix.AT_RECURSIVE, &attr)
	if err == nil && access == ReadOnly {
		err = unix.MountSetattr(tree, "", unix.AT_EMPTY_PATH, &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY})
	}
	if err != nil {
		return fmt.Errorf("mount_setattr (needs Linux 5.12): %w", err)
	}
	return nil
}

// mapIDs makes the topmost mount of a tree show owners as a user namespace with the map has them.
func mapIDs(tree int, ids idmap.Map) error {
	if ids.IsZero() {
		return nil
	}
	namespace, err := ids.Open()
	if err != nil {
		return err
	}
	defer namespace.Close()
	err = unix.MountSetattr(tree, "", unix.AT_EMPTY_PATH,
		&unix.MountAttr{Attr_set: unix.MOUNT_ATTR_IDMAP, Userns_fd: uint64(namespace.Fd())})
	switch {
	case errors.Is(err, unix.EINVAL), errors.Is(err, unix.EPERM):
		return fmt.Errorf("its owners cannot be mapped for a user namespace (hostUsers: false): its file system or this kernel cannot do that, "+
			"or they are mapped already: %w: %w", err, errdefs.ErrNotImplemented)
	case err != nil:
		return fmt.Errorf("mount_setattr: %w", err)
	}
	return nil
}
