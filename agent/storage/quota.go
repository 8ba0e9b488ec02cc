// SPDX-License-Identifier: Apache-2.0

package storage

import (
	"errors"
	"fmt"
	"math"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// From linux/fs.h: FS_IOC_FSGETXATTR and FS_IOC_FSSETXATTR, with struct fsxattr of 28 bytes.
const (
	ioctlGetXattr = 0x801c581f
	ioctlSetXattr = 0x401c5820

	flagProjectInherit = 0x200 // FS_XFLAG_PROJINHERIT
)

// fsxattr is struct fsxattr of linux/fs.h.
type fsxattr struct {
	flags, extentSize, extents, project, cowExtentSize uint32
	_                                                  [8]byte
}

// From linux/quota.h.
const (
	getProjectQuota = 0x800007<<8 | 2 // QCMD(Q_GETQUOTA, PRJQUOTA)
	setProjectQuota = 0x800008<<8 | 2 // QCMD(Q_SETQUOTA, PRJQUOTA)
	quotaBlock      = 1024            // QIF_DQBLKSIZE, bytes
	blockLimits     = 1               // QIF_BLIMITS
)

// quota is struct if_dqblk of linux/quota.h.
type quota struct {
	blockHard, blockSoft, space, inodeHard, inodeSoft, inodes, blockTime, inodeTime uint64
	valid                                                                           uint32
	_                                                                               uint32
}

// limitTree makes an empty directory the top of a tree of its own project, whose files may have so many bytes together
// (0: any number).
func limitTree(path string, project uint32, bytes uint64) error {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	var attr fsxattr
	if err := ioctl(fd, ioctlGetXattr, unsafe.Pointer(&attr)); err != nil {
		return fmt.Errorf("FS_IOC_FSGETXATTR: %w", err)
	}
	attr.flags |= flagProjectInherit
	attr.project = project
	if err := ioctl(fd, ioctlSetXattr, unsafe.Pointer(&attr)); err != nil {
		return fmt.Errorf("FS_IOC_FSSETXATTR: %w", err)
	}
	if bytes == 0 {
		return nil
	}
	q := quota{blockHard: min(bytes, math.MaxInt64)/quotaBlock + 1, valid: blockLimits}
	if err := quotactl(fd, setProjectQuota, project, &q); err != nil {
		return fmt.Errorf("quotactl_fd(Q_SETQUOTA): %w", err)
	}
	return nil
}

// treeQuota reads what a project has, by any path on its file system.
func treeQuota(path string, project uint32) (q quota, err error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return q, err
	}
	defer unix.Close(fd)
	if err := quotactl(fd, getProjectQuota, project, &q); err != nil {
		return q, fmt.Errorf("quotactl_fd(Q_GETQUOTA): %w", err)
	}
	return q, nil
}

func quotactl(fd int, command uintptr, project uint32, q *quota) error {
	_, _, errno := unix.Syscall6(unix.SYS_QUOTACTL_FD, uintptr(fd), command, uintptr(project), uintptr(unsafe.Pointer(q)), 0, 0)
	runtime.KeepAlive(q)
	if errno != 0 {
		return errno
	}
	return nil
}

func ioctl(fd int, request uintptr, arg unsafe.Pointer) error {
	for {
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), request, uintptr(arg))
		if errors.Is(errno, unix.EINTR) {
			continue
		}
		if errno != 0 {
			return errno
		}
		return nil
	}
}
