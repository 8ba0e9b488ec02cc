// SPDX-License-Identifier: Apache-2.0

package rootfs

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"os"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/cloister-project/cloister/virtcontainers/rootfs/erofsimg"
)

// openLayer checks an image of the erofs snapshotter, which the snapshotter keeps while the container exists.
func openLayer(i image) (Layer, error) {
	info, id, err := inspectFile(i.path)
	if err != nil {
		return Layer{}, err
	}
	if info.ExtraDevices != len(i.extra) {
		return Layer{}, fmt.Errorf("the image %s asks for %d further devices, the mount names %d: %w",
			i.path, info.ExtraDevices, len(i.extra), errdefs.ErrInvalidArgument)
	}
	h := sha256.New()
	fmt.Fprintf(h, "image\x00%s\x00%s\x00", i.path, id)
	for _, path := range i.extra {
		id, err := regularFile(path)
		if err != nil {
			return Layer{}, err
		}
		fmt.Fprintf(h, "%s\x00%s\x00", path, id)
	}
	return Layer{Path: i.path, Filesystem: FilesystemEROFS, Extra: i.extra, Key: hex.EncodeToString(h.Sum(nil))}, nil
}

func inspectFile(path string) (erofsimg.Info, string, error) {
	id, err := regularFile(path)
	if err != nil {
		return erofsimg.Info{}, "", err
	}
	f, err := os.Open(path)
	if err != nil {
		return erofsimg.Info{}, "", fmt.Errorf("layer image: %w", err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return erofsimg.Info{}, "", err
	}
	info, err := erofsimg.Inspect(f, st.Size())
	if err != nil {
		return erofsimg.Info{}, "", fmt.Errorf("layer image %s: %w; remove the container image and pull it again: %w", path, err,
			errdefs.ErrInvalidArgument)
	}
	return info, id, nil
}

// regularFile returns the identity of a file that must be there and be a file.
func regularFile(path string) (string, error) {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return "", missing("layer image", path, err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return "", fmt.Errorf("layer image %s is not a regular file: %w", path, errdefs.ErrInvalidArgument)
	}
	return fmt.Sprintf("%d:%d:%d:%d.%d", st.Dev, st.Ino, st.Size, st.Mtim.Sec, st.Mtim.Nsec), nil
}

func missing(what, path string, err error) error {
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) {
		return fmt.Errorf("%s %s is not there; was the snapshot removed? %w: %w", what, path, err, errdefs.ErrNotFound)
	}
	return fmt.Errorf("%s %s: %w", what, path, err)
}

// formatVersion is part of each key: images of another version of the writer or of the merge are not used.
const formatVersion = 1

// treeKey names what a stack of lower directories shows.
func treeKey(t *tree) (string, error) {
	h := sha256.New()
	fmt.Fprintf(h, "tree %d\x00", formatVersion)
	if len(t.lowers) > 1 { // otherwise they decide nothing
		for _, option := range t.merge {
			fmt.Fprintf(h, "%s\x00", option)
		}
	} else {
		fmt.Fprintf(h, "%v\x00", t.userXattr)
	}
	for _, dir := range t.lowers {
		if err := hashDir(h, dir); err != nil {
			return "", err
		}
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

// hashDir identifies a directory by what stays while it exists, also over a reboot where the filesystem has an id of its own.
func hashDir(h hash.Hash, dir string) error {
	var st unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, dir, 0, unix.STATX_BASIC_STATS|unix.STATX_BTIME, &st); err != nil {
		return missing("layer directory", dir, err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR {
		return fmt.Errorf("layer %s is not a directory: %w", dir, errdefs.ErrInvalidArgument)
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(dir, &fs); err != nil {
		return missing("layer directory", dir, err)
	}
	fmt.Fprintf(h, "%s\x00%x:%x:%x\x00%d\x00", dir, fs.Type, fs.Fsid.Val[0], fs.Fsid.Val[1], st.Ino)
	if st.Mask&unix.STATX_BTIME != 0 {
		fmt.Fprintf(h, "born %d.%d\x00", st.Btime.Sec, st.Btime.Nsec)
	}
	fmt.Fprintf(h, "changed %d.%d\x00", st.Ctime.Sec, st.Ctime.Nsec)
	if fs.Type == unix.EROFS_SUPER_MAGIC_V1 { // an image mounted there: all roots have the same inode number
		fmt.Fprintf(h, "%d:%d\x00", fs.Blocks, fs.Files)
	}
	return nil
}
