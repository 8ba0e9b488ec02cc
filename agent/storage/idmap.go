// SPDX-License-Identifier: Apache-2.0

package storage

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// mapIDs mounts what is at path once more, for the container alone, with its files' owners mapped by the user namespace, and returns
// where.
func (c *container) mapIDs(path, name string, namespace *os.File) (string, error) {
	tree, err := unix.OpenTree(unix.AT_FDCWD, path, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_SYMLINK_NOFOLLOW)
	if err != nil {
		return "", fmt.Errorf("open_tree: %w", err)
	}
	defer unix.Close(tree)
	attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_IDMAP, Userns_fd: uint64(namespace.Fd())}
	if err := unix.MountSetattr(tree, "", unix.AT_EMPTY_PATH, &attr); err != nil {
		return "", fmt.Errorf("map owners: %w", err)
	}
	place, err := c.mkdir(name)
	if err != nil {
		return "", err
	}
	if err := attach(tree, place); err != nil {
		return "", err
	}
	c.done = append(c.done, step{mount: place})
	return place, nil
}
