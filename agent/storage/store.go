// SPDX-License-Identifier: Apache-2.0

package storage

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"sync"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/cloister-project/cloister/agent-protocol/wire"
)

// defaultShm is the size of the pod's /dev/shm unless it is given.
const defaultShm = 64 << 20

// Where the guest's kernel lists disks, and where their device nodes are.
const (
	sysBlock = "/sys/block"
	devices  = "/dev"
)

// Store is the guest's storage. Its methods may be called from any goroutine.
type Store struct {
	root string
	// gate, where not nil, returns when the kernel's modules are there.
	gate func(context.Context) error
	// newDisks finds disks; tests have others.
	newDisks func() (diskFinder, error)
	// virtiofs is where the kernel lists virtio-fs devices.
	virtiofs string
	// platform names what the guest is confidential by; empty for an ordinary VM.
	platform string

	mu         sync.Mutex
	names      uint64
	containers map[string]*container
	images     map[string]*image // by the serial of the first disk
	diskUsers  map[string]int    // mounted images by the serial of each of their disks
	shares     map[string]*share // by tag
	volumes    map[string]*volume
	scratch    map[string]*scratch
	shm        bool
	disk       *scratchDisk // nil: none

	// background are goroutines that end by themselves.
	background sync.WaitGroup
}

// New makes a Store in the directory root, which it makes. It mounts a tmpfs there.
func New(root string) (*Store, error) {
	if err := os.MkdirAll(root, 0o755); err != nil {
		return nil, fmt.Errorf("make the directory of storage: %w", err)
	}
	if err := mountFS("tmpfs", root, unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NODEV, option{"mode", "0711"}); err != nil {
		return nil, err
	}
	if err := unix.MountSetattr(unix.AT_FDCWD, root, 0, &unix.MountAttr{Propagation: unix.MS_SHARED}); err != nil {
		return nil, fmt.Errorf("share mounts below %s with mount namespaces made from this one: %w", root, err)
	}
	s := &Store{
		root:       root,
		newDisks:   func() (diskFinder, error) { return newSysfsDisks(sysBlock, devices) },
		virtiofs:   "/sys/fs/virtiofs",
		containers: map[string]*container{},
		images:     map[string]*image{},
		diskUsers:  map[string]int{},
		shares:     map[string]*share{},
		volumes:    map[string]*volume{},
		scratch:    map[string]*scratch{},
	}
	for _, dir := range []string{"layers", "shares", "shm", "volumes", "scratch", "disk", "c"} {
		if err := os.Mkdir(filepath.Join(root, dir), 0o711); err != nil {
			return nil, err
		}
	}
	return s, nil
}

// After makes everything that needs kernel modules wait for the function first. It must be called before anything else.
func (s *Store) After(wait func(context.Context) error) { s.gate = wait }

// Confidential makes the Store refuse live directories of the host and encrypt the scratch disk from now on, in the name of the
// platform. It must be called before anything else.
func (s *Store) Confidential(platform string) { s.platform = platform }

func (s *Store) wait(ctx context.Context) error {
	if s.gate == nil {
		return nil
	}
	return s.gate(ctx)
}

// place returns a new path in one of the Store's directories.
func (s *Store) place(dir string) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.names++
	return filepath.Join(s.root, dir, strconv.FormatUint(s.names, 10))
}

// SetupShm makes the pod's /dev/shm, a tmpfs of so many bytes (0: 64 MiB). Called again it changes the size.
func (s *Store) SetupShm(bytes uint64) error {
	if bytes == 0 {
		bytes = defaultShm
	}
	s.mu.Lock()
	again := s.shm
	s.shm = true
	s.mu.Unlock()
	path := s.shmPath()
	const attrs = unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOEXEC
	size := strconv.FormatUint(bytes, 10)
	var err error
	if again {
		data := "size=" + size
		if err = unix.Mount("", path, "", unix.MS_REMOUNT|unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, data); err != nil {
			err = fmt.Errorf("change the size of the pod's /dev/shm (%s): %w", data, err)
		}
		return err
	}
	if err = mountFS("tmpfs", path, attrs, option{"mode", "1777"}, option{"size", size}); err != nil {
		s.mu.Lock()
		s.shm = false
		s.mu.Unlock()
	}
	return err
}

func (s *Store) shmPath() string { return filepath.Join(s.root, "shm") }

// container is what a container has here. Whoever holds turn may change the rest.
type container struct {
	turn chan struct{}
	// gone says that the container was removed; whoever got the turn then looks it up again.
	gone             bool
	rootfs, prepared bool
	dir              string
	// writable is where the writable layer is, terminationLog where that file is; Store.mu guards them.
	writable, terminationLog string
	// done lists what Remove takes back, the last first.
	done []step
}

// step is something to take back: a mount, one with those in it, a path, a tree of the scratch disk, or the use of an image or of a
// share's entry.
type step struct {
	mount, mounts, path, tree string
	image                     *image
	entry                     *entry
}

// enter takes the container's turn, making it if there is none. The caller must call leave.
func (s *Store) enter(ctx context.Context, id string) (*container, error) {
	if !wire.ValidID(id) {
		return nil, fmt.Errorf("container id %.140q: %w", id, errdefs.ErrInvalidArgument)
	}
	for {
		s.mu.Lock()
		c := s.containers[id]
		if c == nil {
			if len(s.containers) >= wire.MaxContainers {
				s.mu.Unlock()
				return nil, fmt.Errorf("there are %d containers, the limit: %w", wire.MaxContainers, errdefs.ErrResourceExhausted)
			}
			c = &container{turn: make(chan struct{}, 1)}
			s.containers[id] = c
		}
		s.mu.Unlock()
		select {
		case c.turn <- struct{}{}:
		case <-ctx.Done():
			return nil, fmt.Errorf("wait for another operation on container %s: %w", id, context.Cause(ctx))
		}
		if !c.gone {
			return c, nil
		}
		<-c.turn
	}
}

// leave gives the turn back and forgets a container that has nothing.
func (s *Store) leave(id string, c *container) {
	if len(c.done) == 0 && !c.rootfs && !c.prepared {
		c.gone = true
		s.mu.Lock()
		delete(s.containers, id)
		s.mu.Unlock()
	}
	<-c.turn
}

// directory makes the container's directory.
func (s *Store) directory(c *container) error {
	if c.dir != "" {
		return nil
	}
	dir := s.place("c")
	if err := os.Mkdir(dir, 0o711); err != nil {
		return err
	}
	c.dir = dir
	c.done = append(c.done, step{path: dir})
	return nil
}

// mkdir makes a directory of the container.
func (c *container) mkdir(name string) (string, error) {
	path := filepath.Join(c.dir, name)
	if err := os.Mkdir(path, 0o711); err != nil {
		return "", err
	}
	c.done = append(c.done, step{path: path})
	return path, nil
}

// Remove unmounts and deletes everything of a container and tells which disks the guest no longer uses. A container that
// is not known has nothing. After an error some of it is left; Remove then may be called again.
func (s *Store) Remove(ctx context.Context, containerID string) (releasedSerials []string, err error) {
	s.mu.Lock()
	known := s.containers[containerID] != nil
	s.mu.Unlock()
	if !known {
		return nil, nil
	}
	c, err := s.enter(ctx, containerID)
	if err != nil {
		return nil, err
	}
	defer s.leave(containerID, c)
	s.setWritable(c, "")
	released, err := s.undo(c, 0)
	if err != nil {
		return released, fmt.Errorf("remove the storage of container %s: %w", containerID, err)
	}
	c.rootfs, c.prepared = false, false
	return released, nil
}

// undo takes back steps until only keep are left. It stops at the first that fails. It takes no context: what was begun
// is ended, and no step waits for the host.
func (s *Store) undo(c *container, keep int) (released []string, err error) {
	for len(c.done) > keep {
		last := c.done[len(c.done)-1]
		switch {
		case last.mount != "":
			err = unmount(last.mount, 0)
		case last.mounts != "":
			err = unmount(last.mounts, unix.MNT_DETACH)
		case last.image != nil:
			var serials []string
			serials, err = s.releaseImage(last.image)
			released = append(released, serials...)
		case last.tree != "":
			err = s.discard(last.tree)
		case last.entry != nil:
			err = s.release(last.entry)
		default:
			// Never recursive: a mount that is still there must not lose its content.
			if err = os.Remove(last.path); errors.Is(err, os.ErrNotExist) {
				err = nil
			}
		}
		if err != nil {
			return released, err
		}
		c.done = c.done[:len(c.done)-1]
		if last.path != "" && last.path == c.dir {
			c.dir = ""
		}
	}
	return released, nil
}

// rollback undoes what a failed operation did and returns its error, with that of the undoing.
func (s *Store) rollback(c *container, keep int, err error) error {
	_, undoErr := s.undo(c, keep)
	if undoErr != nil {
		return errors.Join(err, fmt.Errorf("and take back what was done: %w", undoErr))
	}
	return err
}
