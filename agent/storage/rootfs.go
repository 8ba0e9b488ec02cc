// SPDX-License-Identifier: Apache-2.0

package storage

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	agentv1 "github.com/cloister-project/cloister/agent-protocol/v1"
	"github.com/cloister-project/cloister/agent-protocol/wire"
)

// readonlyBytes limits the writable layer of a read-only root: only mount points are made in it.
const readonlyBytes = 32 << 20

// MountRootfs mounts a container's root file system and returns its path. It waits for the layers' disks until ctx ends.
//
// The mount is writable also for a readonly root, within narrow limits, so that mount points can be made in it;
// libcontainer makes it read-only when they are. If MountRootfs fails nothing of it is left.
func (s *Store) MountRootfs(ctx context.Context, containerID string, r *agentv1.Rootfs, readonly bool) (path string, err error) {
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
	path, writable, err := s.mountRootfs(ctx, c, serials, r.GetWritableBytes(), readonly)
	if err != nil {
		return "", s.rollback(c, keep, fmt.Errorf("root file system of container %s: %w", containerID, err))
	}
	c.rootfs = true
	s.setWritable(c, writable)
	return path, nil
}

// mountRootfs returns the root and the place of its writable layer.
func (s *Store) mountRootfs(ctx context.Context, c *container, serials [][]string, writable uint64, readonly bool) (root, rw string,
	err error) {
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

	disks, err := s.newDisks()
	if err != nil {
		return "", "", err
	}
	defer disks.close()
	var options []option
	var top string
	for i, serial := range serials {
		im, err := s.acquireImage(ctx, disks, serial)
		if err != nil {
			return "", "", fmt.Errorf("layer %d of %d: %w", i+1, len(serials), err)
		}
		c.done = append(c.done, step{image: im})
		if i == 0 {
			top = im.path
		}
		options = append(options, option{"lowerdir+", im.path})
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
	if err := unix.Lstat(top, &stat); err != nil {
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
