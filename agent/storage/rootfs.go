// SPDX-License-Identifier: Apache-2.0

package storage

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	agentv1 "github.com/cloister-project/cloister/agent-protocol/v1"
	"github.com/cloister-project/cloister/agent-protocol/wire"
	"github.com/cloister-project/cloister/internal/idmap"
)

// readonlyBytes limits the writable layer of a read-only root: only mount points are made in it.
const readonlyBytes = 32 << 20

// MountRootfs mounts a container's root file system and returns its path. It waits for the layers' disks until ctx ends.
//
// The mount is writable also for a readonly root, within narrow limits, so that mount points can be made in it;
// libcontainer makes it read-only when they are. Layers that ask for it have their files' owners mapped by ids, the map of the
// container's user namespace. If MountRootfs fails nothing of it is left.
func (s *Store) MountRootfs(ctx context.Context, containerID string, r *agentv1.Rootfs, readonly bool, ids idmap.Map) (path string,
	err error) {
	layers := r.GetLayers()
	if len(layers) > wire.MaxLayers {
		return "", fmt.Errorf("root file system of %d layers, the limit is %d: %w", len(layers), wire.MaxLayers, errdefs.ErrInvalidArgument)
	}
	serials := make([][]string, len(layers))
	first := map[string]bool{}
	for i, l := range layers {
		if serials[i], err = checkLayer(l); err != nil {
			return "", err
		}
		if first[l.GetSerial()] {
			return "", fmt.Errorf("root file system has the layer %s twice: %w", l.GetSerial(), errdefs.ErrInvalidArgument)
		}
		if l.GetIdMapped() && ids.IsZero() {
			return "", fmt.Errorf("layer %s is id-mapped, and the container has no user namespace: %w", l.GetSerial(), errdefs.ErrInvalidArgument)
		}
		first[l.GetSerial()] = true
	}
	if err := s.wait(ctx); err != nil {
		return "", err
	}
	c, err := s.enter(ctx, containerID)
	if err != nil {
		return "", err
	}
	defer s.leave(containerID, c)
	if c.rootfs {
		return "", fmt.Errorf("root file system of container %s: %w", containerID, errdefs.ErrAlreadyExists)
	}
	keep := len(c.done)
	path, writable, err := s.mountRootfs(ctx, c, layers, serials, r.GetWritableBytes(), readonly, ids)
	if err != nil {
		return "", s.rollback(c, keep, fmt.Errorf("root file system of container %s: %w", containerID, err))
	}
	c.rootfs = true
	s.setWritable(c, writable)
	return path, nil
}

// mountRootfs returns the root and the place of its writable layer.
func (s *Store) mountRootfs(ctx context.Context, c *container, layers []*agentv1.Layer, serials [][]string, writable uint64,
	readonly bool, ids idmap.Map) (root, rw string, err error) {
	if err := s.directory(c); err != nil {
		return "", "", err
	}
	if readonly && (writable == 0 || writable > readonlyBytes) {
		writable = readonlyBytes
	}
	// Without a size tmpfs takes half of the memory.
	var size []option
	if writable > 0 {
		size = []option{{"size", strconv.FormatUint(writable, 10)}}
	}
	if root, err = c.mkdir("rootfs"); err != nil {
		return "", "", err
	}
	if len(serials) == 0 {
		if err := mountFS("tmpfs", root, 0, append(size, option{"mode", "0755"})...); err != nil {
			return "", "", err
		}
		c.done = append(c.done, step{mount: root})
		return root, root, nil
	}

	lowers, err := s.lowers(ctx, c, layers, serials, ids)
	if err != nil {
		return "", "", err
	}
	options := make([]option, 0, len(lowers))
	for _, path := range lowers {
		options = append(options, option{"lowerdir+", path})
	}
	if rw, err = s.writableLayer(ctx, c, size, writable, readonly); err != nil {
		return "", "", err
	}
	upper, work := filepath.Join(rw, "upper"), filepath.Join(rw, "work")
	for _, dir := range []string{upper, work} {
		if err := os.Mkdir(dir, 0o755); err != nil {
			return "", "", err
		}
	}
	// The root directory's owner and mode come from the upper layer: make them the image's.
	var stat unix.Stat_t
	if err := unix.Lstat(lowers[0], &stat); err != nil {
		return "", "", fmt.Errorf("look at the topmost layer: %w", err)
	}
	if err := unix.Lchown(upper, int(stat.Uid), int(stat.Gid)); err != nil {
		return "", "", err
	}
	if err := unix.Chmod(upper, stat.Mode&0o7777); err != nil {
		return "", "", err
	}
	options = append(options, option{"upperdir", upper}, option{"workdir", work},
		// Said in so many words, since kernels differ: a lower layer must not point into others by its attributes.
		option{"redirect_dir", "nofollow"}, option{"metacopy", "off"}, option{"index", "off"})
	if err := mountFS("overlay", root, 0, options...); err != nil {
		return "", "", err
	}
	c.done = append(c.done, step{mount: root})
	return root, rw, nil
}

// lowers mounts the layers and returns where, topmost first.
func (s *Store) lowers(ctx context.Context, c *container, layers []*agentv1.Layer, serials [][]string, ids idmap.Map) ([]string, error) {
	var namespace *os.File
	if slices.ContainsFunc(layers, (*agentv1.Layer).GetIdMapped) {
		var err error
		if namespace, err = ids.Open(); err != nil {
			return nil, err
		}
		defer namespace.Close()
	}
	disks, err := s.newDisks()
	if err != nil {
		return nil, err
	}
	defer disks.close()
	paths := make([]string, len(layers))
	for i, layer := range layers {
		im, err := s.acquireImage(ctx, disks, serials[i])
		if err == nil {
			c.done = append(c.done, step{image: im})
			paths[i] = im.path
			if layer.GetIdMapped() {
				paths[i], err = c.mapIDs(im.path, fmt.Sprintf("m%d", i), namespace)
			}
		}
		if err != nil {
			return nil, fmt.Errorf("layer %d of %d: %w", i+1, len(layers), err)
		}
	}
	return paths, nil
}

// writableLayer makes the directory that the writable layer goes to: on the scratch disk, or in memory.
func (s *Store) writableLayer(ctx context.Context, c *container, size []option, bytes uint64, readonly bool) (string, error) {
	if !readonly {
		path, err := s.onDisk(ctx, bytes)
		if err != nil {
			return "", err
		}
		if path != "" {
			c.done = append(c.done, step{tree: path})
			return path, nil
		}
	}
	rw, err := c.mkdir("rw")
	if err != nil {
		return "", err
	}
	if err := mountFS("tmpfs", rw, unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NODEV, append(size, option{"mode", "0711"})...); err != nil {
		return "", err
	}
	c.done = append(c.done, step{mount: rw})
	return rw, nil
}
