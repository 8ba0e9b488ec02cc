// SPDX-License-Identifier: Apache-2.0

package storage

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	agentv1 "github.com/cloister-project/cloister/agent-protocol/v1"
	"github.com/cloister-project/cloister/agent-protocol/wire"
	"github.com/cloister-project/cloister/agent/uevent"
)

// maxTag is the room for a tag in a virtio-fs device's configuration, bytes.
const maxTag = 36

// maxShares bounds the virtio-fs devices.
const maxShares = 64

// Mounts of live directories of the host honour neither devices nor set-user-ID bits: the host could make either.
const sharedAttrs = unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV

// share is a virtio-fs device. path and err are valid once mounted is closed.
type share struct {
	path    string
	mounted chan struct{}
	err     error
	// users of each entry, the binds of containers; under Store.mu.
	users map[string]int
}

// entry is one use of an entry of a share.
type entry struct {
	share *share
	name  string
}

// use counts a use of an entry.
func (s *Store) use(sh *share, name string) *entry {
	s.mu.Lock()
	defer s.mu.Unlock()
	sh.users[name]++
	return &entry{sh, name}
}

// release ends a use of an entry. The last one unmounts what became of the entry in the share: the host's mounts are mounts
// here, too, made by the kernel when they are first looked into, and hold what they are of.
func (s *Store) release(e *entry) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if e.share.users[e.name] == 1 {
		// Under the lock, so that nobody takes the mount into use meanwhile. The kernel alone is asked.
		if err := unix.Unmount(filepath.Join(e.share.path, e.name), unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil &&
			!errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("unmount %s in a shared directory: %w", e.name, err)
		}
		delete(e.share.users, e.name)
		return nil
	}
	e.share.users[e.name]--
	return nil
}

// checkShared checks all that can be told from the request alone.
func checkShared(p *agentv1.SharedPath) error {
	paths := p.GetSubmounts()
	if len(paths) > wire.MaxSubmounts {
		return fmt.Errorf("%d mounts in a shared directory, the limit is %d: %w", len(paths), wire.MaxSubmounts, errdefs.ErrInvalidArgument)
	}
	sum := 0
	for _, path := range paths {
		sum += len(path)
	}
	if sum > wire.MaxSubmountPaths {
		return fmt.Errorf("%d bytes of paths of mounts in a shared directory, the limit is %d: %w", sum, wire.MaxSubmountPaths,
			errdefs.ErrInvalidArgument)
	}
	if p.GetPath() != "" {
		paths = append([]string{p.GetPath()}, paths...)
	}
	for _, path := range paths {
		if path == "." || len(path) > wire.MaxSharedPath || strings.ContainsRune(path, 0) || !filepath.IsLocal(path) ||
			filepath.Clean(path) != path {
			return fmt.Errorf("path %.80q in a shared directory is not a clean relative one of at most %d bytes: %w", path, wire.MaxSharedPath,
				errdefs.ErrInvalidArgument)
		}
	}
	return nil
}

// MountShared mounts the virtio-fs device with the tag; containers' SharedPath mounts then find it. It waits for the
// device until ctx ends. A device that is mounted already stays so.
func (s *Store) MountShared(ctx context.Context, tag string) error {
	if err := s.refuseShared(); err != nil {
		return err
	}
	if len(tag) > maxTag || !wire.ValidID(tag) {
		return fmt.Errorf("tag of a shared directory %.40q is not 1 to %d of [A-Za-z0-9_.-], the first alphanumeric: %w", tag, maxTag,
			errdefs.ErrInvalidArgument)
	}
	s.mu.Lock()
	if sh := s.shares[tag]; sh != nil {
		s.mu.Unlock()
		if err := waitFor(ctx, sh.mounted); err != nil {
			return fmt.Errorf("wait until shared directory %s is mounted: %w", tag, err)
		}
		return sh.err
	}
	if len(s.shares) >= maxShares {
		s.mu.Unlock()
		return fmt.Errorf("there are %d shared directories, the limit: %w", maxShares, errdefs.ErrResourceExhausted)
	}
	sh := &share{mounted: make(chan struct{}), users: map[string]int{}}
	s.shares[tag] = sh
	s.mu.Unlock()

	sh.path = s.place("shares")
	sh.err = s.mountShare(ctx, tag, sh.path)
	if sh.err != nil {
		s.mu.Lock()
		delete(s.shares, tag)
		s.mu.Unlock()
	}
	close(sh.mounted)
	return sh.err
}

// refuseShared keeps the host's directories, whose content it can change at any moment, out of a confidential guest.
func (s *Store) refuseShared() error {
	if s.platform == "" {
		return nil
	}
	return fmt.Errorf("this is a confidential guest (platform %s): it takes no live directories of the host; use volumes that are copied: %w",
		s.platform, errdefs.ErrFailedPrecondition)
}

func (s *Store) mountShare(ctx context.Context, tag, path string) error {
	events, err := uevent.Listen()
	if err != nil {
		return err
	}
	defer events.Close()
	err = events.Await(ctx, "virtiofs", func() (bool, error) {
		tags, err := filepath.Glob(filepath.Join(s.virtiofs, "*", "tag"))
		if err != nil {
			return false, err
		}
		for _, file := range tags {
			if text, err := readLimited(file); err == nil && strings.TrimSpace(string(text)) == tag {
				return true, nil
			}
		}
		return false, nil
	})
	if err != nil {
		return fmt.Errorf("wait for the virtio-fs device with tag %s: %w", tag, err)
	}
	if err := os.Mkdir(path, 0o711); err != nil {
		return err
	}
	if err := mountFS("virtiofs", path, sharedAttrs, option{"source", tag}); err != nil {
		return errors.Join(err, os.Remove(path))
	}
	return nil
}

// bindShared bind mounts an entry of a shared directory to a place of the container and returns that place.
func (s *Store) bindShared(c *container, index int, p *agentv1.SharedPath) (string, error) {
	if err := s.refuseShared(); err != nil {
		return "", err
	}
	if !wire.ValidID(p.GetName()) {
		return "", fmt.Errorf("name in a shared directory %.140q is not one element of a path: %w", p.GetName(), errdefs.ErrInvalidArgument)
	}
	s.mu.Lock()
	sh := s.shares[p.GetTag()]
	s.mu.Unlock()
	mounted := false
	if sh != nil {
		select {
		case <-sh.mounted:
			mounted = sh.err == nil
		default:
		}
	}
	if !mounted {
		return "", fmt.Errorf("shared directory %.40q is not mounted: %w", p.GetTag(), errdefs.ErrFailedPrecondition)
	}

	// The host decides what the entry is at every moment. It is opened once, as it is, and only the opened thing used.
	dir, err := unix.Open(sh.path, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", fmt.Errorf("open shared directory %s: %w", p.GetTag(), err)
	}
	defer unix.Close(dir)
	c.done = append(c.done, step{entry: s.use(sh, p.GetName())})
	fd, err := openShared(dir, p)
	if err != nil {
		return "", fmt.Errorf("open %s in shared directory %s: %w", filepath.Join(p.GetName(), p.GetPath()), p.GetTag(), err)
	}
	defer unix.Close(fd)
	// What is not there any more need not be mounted.
	for _, path := range p.GetSubmounts() {
		if below, err := openDirectory(fd, path); err == nil {
			unix.Close(below)
		}
	}
	place, err := c.bindOpened(fmt.Sprintf("s%d", index), fd)
	if err != nil {
		return "", fmt.Errorf("bind %s in shared directory %s: %w", p.GetName(), p.GetTag(), err)
	}
	return place, nil
}

// openShared opens an entry of a share, or a part of it.
func openShared(dir int, p *agentv1.SharedPath) (int, error) {
	fd, err := openDirectory(dir, p.GetName())
	if errors.Is(err, unix.ENOTDIR) && p.GetPath() == "" {
		fd, err = openFile(dir, p.GetName(), unix.RESOLVE_NO_XDEV)
	}
	if err != nil {
		return -1, err
	}
	if p.GetPath() != "" {
		defer unix.Close(fd)
		entry := fd
		// Containers may change what is on the way, and no link of theirs is followed.
		if fd, err = openDirectory(entry, p.GetPath()); errors.Is(err, unix.ENOTDIR) {
			fd, err = openFile(entry, p.GetPath(), 0)
		}
		if err != nil {
			return -1, err
		}
	}
	var st unix.Stat_t
	if err = unix.Fstat(fd, &st); err == nil && p.GetInode() != 0 && st.Ino != p.GetInode() {
		err = fmt.Errorf("something else has been put in its place (inode %d, not %d): %w", st.Ino, p.GetInode(), errdefs.ErrFailedPrecondition)
	}
	if err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// openDirectory opens a directory in a share as one, so that the kernel makes the mount that it is here and now: made in the bind
// mounts of containers, each would be a file system of its own.
func openDirectory(dir int, path string) (int, error) {
	return unix.Openat2(dir, path, &unix.OpenHow{
		Flags:   unix.O_PATH | unix.O_DIRECTORY | unix.O_NOFOLLOW | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS,
	})
}

// openFile opens what is no directory.
func openFile(dir int, path string, resolve uint64) (int, error) {
	return unix.Openat2(dir, path, &unix.OpenHow{
		Flags:   unix.O_PATH | unix.O_NOFOLLOW | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | resolve,
	})
}

// bindOpened bind mounts a file or directory that was opened (O_PATH), with the mounts in it, to a place of the container's and
// returns that place.
func (c *container) bindOpened(name string, fd int) (string, error) {
	var stat unix.Stat_t
	if err := unix.Fstat(fd, &stat); err != nil {
		return "", err
	}
	place := filepath.Join(c.dir, name)
	var err error
	switch stat.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		err = os.Mkdir(place, 0o711)
	case unix.S_IFREG:
		err = os.WriteFile(place, nil, 0o600)
	default:
		return "", fmt.Errorf("it is neither a file nor a directory (mode %#o): %w", stat.Mode, errdefs.ErrInvalidArgument)
	}
	if err != nil {
		return "", err
	}
	c.done = append(c.done, step{path: place})
	tree, err := unix.OpenTree(fd, "", unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_EMPTY_PATH|unix.AT_RECURSIVE)
	if err != nil {
		return "", err
	}
	defer unix.Close(tree)
	if err := attach(tree, place); err != nil {
		return "", fmt.Errorf("to %s: %w", place, err)
	}
	c.done = append(c.done, step{mounts: place})
	return place, nil
}
