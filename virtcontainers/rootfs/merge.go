// SPDX-License-Identifier: Apache-2.0

package rootfs

import (
	"errors"
	"fmt"
	"runtime"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// withTree calls fn with what a stack of directories shows, as an open directory, on a thread as erofsimg.Build wants it.
//
// More than one directory is merged by the kernel's overlayfs, mounted in a namespace that only this thread has and that ends
// with it, however it ends. mountPoint is an existing directory; something is mounted over it there, and only there, on
// kernels before 6.7.
func withTree(dirs, merge []string, mountPoint string, mount overlayFunc, fn func(dirfd int) error) error {
	done := make(chan error, 1)
	go func() {
		// Never unlocked: the runtime ends the thread, and with it the namespace, when this function returns.
		runtime.LockOSThread()
		done <- func() error {
			flags := unix.CLONE_FS
			if len(dirs) > 1 {
				flags |= unix.CLONE_NEWNS
			}
			if err := unix.Unshare(flags); err != nil {
				return fmt.Errorf("make a mount namespace to merge layers in: %w", err)
			}
			fd, err := openTree(dirs, merge, mountPoint, mount)
			if err != nil {
				return err
			}
			defer unix.Close(fd)
			return fn(fd)
		}()
	}()
	return <-done
}

func openTree(dirs, merge []string, mountPoint string, mount overlayFunc) (int, error) {
	if len(dirs) == 1 {
		fd, err := unix.Open(dirs[0], unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			return -1, missing("layer directory", dirs[0], err)
		}
		return fd, nil
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return -1, fmt.Errorf("make the mount namespace private: %w", err)
	}
	// Directories go to overlayfs as /proc/…/fd/N: no length limit, no escaping. They must be opened in this namespace.
	fds := make([]int, 0, len(dirs))
	defer func() {
		for _, fd := range fds {
			unix.Close(fd)
		}
	}()
	for _, dir := range dirs {
		fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			return -1, missing("layer directory", dir, err)
		}
		fds = append(fds, fd)
	}
	fd, err := mount(fds, merge, mountPoint)
	if err != nil {
		return -1, fmt.Errorf("merge %d layers with overlayfs (%s): %w", len(dirs), strings.Join(merge, ","), err)
	}
	return fd, nil
}

// overlayFunc mounts open directories, the topmost first, and returns the result as an open directory.
type overlayFunc func(fds []int, merge []string, mountPoint string) (int, error)

// overlayAnyhow takes what the kernel has.
func overlayAnyhow(fds []int, merge []string, mountPoint string) (int, error) {
	fd, err := overlayByFsopen(fds, merge, mountPoint)
	if errors.Is(err, errNoLowerdirAppend) {
		return overlayByMount(fds, merge, mountPoint)
	}
	return fd, err
}

// errNoLowerdirAppend: the kernel is older than 6.7 and takes all directories in one string of at most a page.
var errNoLowerdirAppend = errors.New("overlayfs has no option lowerdir+")

func overlayByFsopen(fds []int, merge []string, _ string) (int, error) {
	fs, err := unix.Fsopen("overlay", unix.FSOPEN_CLOEXEC)
	if err != nil {
		if errors.Is(err, unix.ENOSYS) {
			return -1, errNoLowerdirAppend
		}
		if errors.Is(err, unix.ENODEV) {
			return -1, fmt.Errorf("the host's kernel has no overlayfs; load its module (modprobe overlay): %w", errdefs.ErrFailedPrecondition)
		}
		return -1, err
	}
	defer unix.Close(fs)
	for i, fd := range fds {
		if err := unix.FsconfigSetString(fs, "lowerdir+", "/proc/thread-self/fd/"+strconv.Itoa(fd)); err != nil {
			if i == 0 && errors.Is(err, unix.EINVAL) {
				return -1, errNoLowerdirAppend
			}
			return -1, contextError(fs, err)
		}
	}
	for _, option := range merge {
		key, value, hasValue := strings.Cut(option, "=")
		if hasValue {
			err = unix.FsconfigSetString(fs, key, value)
		} else {
			err = unix.FsconfigSetFlag(fs, key)
		}
		if err != nil {
			return -1, contextError(fs, fmt.Errorf("%s: %w", option, err))
		}
	}
	if err := unix.FsconfigSetFlag(fs, "ro"); err != nil {
		return -1, contextError(fs, err)
	}
	if err := unix.FsconfigCreate(fs); err != nil {
		return -1, contextError(fs, err)
	}
	mnt, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, unix.MOUNT_ATTR_RDONLY|unix.MOUNT_ATTR_NOATIME)
	if err != nil {
		return -1, contextError(fs, err)
	}
	defer unix.Close(mnt)
	// What fsmount gives is an O_PATH file.
	return unix.Openat(mnt, ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
}

// contextError adds the kernel's own words, which can be read from the filesystem context.
func contextError(fs int, err error) error {
	buf := make([]byte, 1024)
	if n, e := unix.Read(fs, buf); e == nil && n > 2 {
		return fmt.Errorf("%w (%s)", err, strings.TrimSpace(strings.TrimPrefix(string(buf[:n]), "e ")))
	}
	return err
}

// overlayByMount works from 5.10 on. Relative to the directory of open files, 500 layers are less than a page.
func overlayByMount(fds []int, merge []string, mountPoint string) (int, error) {
	if err := unix.Chdir("/proc/thread-self/fd"); err != nil {
		return -1, err
	}
	lowers := make([]string, 0, len(fds))
	for _, fd := range fds {
		lowers = append(lowers, strconv.Itoa(fd))
	}
	options := strings.Join(append([]string{"lowerdir=" + strings.Join(lowers, ":")}, merge...), ",")
	if err := unix.Mount("overlay", mountPoint, "overlay", unix.MS_RDONLY|unix.MS_NOATIME, options); err != nil {
		return -1, fmt.Errorf("%w (see the kernel's log)", err)
	}
	return unix.Open(mountPoint, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
}
