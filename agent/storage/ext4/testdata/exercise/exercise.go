// SPDX-License-Identifier: Apache-2.0

// Package exercise has the kernel use a file system that package ext4 made: in tests on a loop device, and in a guest.
package exercise

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Options say what is on the device.
type Options struct {
	Device, Dir string
	Quota       bool
	// Blocks and Files are what statfs has to say.
	Blocks, Files uint64
}

const (
	blockSize = 4096
	project   = 42
	// Limits of the project, one inode and one block of which are its directory's.
	limitBytes  = 8 << 20
	limitInodes = 10
	many        = 40
	// kernelKeeps is how many blocks at most the kernel keeps for extents that it has to split, a fiftieth of all of them
	// (reserved_clusters in sysfs).
	kernelKeeps = 4096
)

// ErrNoQuota says that the kernel was built without the format of quota files, or has not loaded it.
var ErrNoQuota = errors.New("the kernel has no vfsv1 quota files (CONFIG_QFMT_V2)")

// Run mounts the device at Dir, uses it, and unmounts it.
func Run(o Options) (err error) {
	if err := mount(o); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, unix.Unmount(o.Dir, 0)) }()

	var whole unix.Statfs_t
	if err := unix.Statfs(o.Dir, &whole); err != nil {
		return err
	}
	if whole.Blocks != o.Blocks || whole.Files != o.Files || whole.Bavail+kernelKeeps < whole.Bfree || whole.Bsize != blockSize {
		return fmt.Errorf("statfs says %+v, not %d blocks and %d files", whole, o.Blocks, o.Files)
	}
	steps := []func(Options) error{spread, fill, remove}
	if o.Quota {
		steps = []func(Options) error{limited, spread, account, fill, remove}
	}
	for i, step := range steps {
		if err := step(o); err != nil {
			return fmt.Errorf("step %d: %w", i, err)
		}
	}
	return noErrors(o.Device)
}

func mount(o Options) error {
	options := ""
	if o.Quota {
		options = "prjquota"
	}
	err := unix.Mount(o.Device, o.Dir, "ext4", unix.MS_NODEV|unix.MS_NOSUID, options)
	if err == nil {
		return nil
	}
	// Without the format there is only mounting for reading, which is how to tell from a bad file system.
	if o.Quota && (errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ESRCH)) {
		if unix.Mount(o.Device, o.Dir, "ext4", unix.MS_RDONLY, "") == nil {
			return errors.Join(ErrNoQuota, unix.Unmount(o.Dir, 0))
		}
	}
	return fmt.Errorf("mount: %w", err)
}

// spread makes directories, which the kernel spreads over groups that had no inodes, and files in them.
func spread(o Options) error {
	for i := range many {
		dir := filepath.Join(o.Dir, fmt.Sprint("directory ", i))
		if err := os.Mkdir(dir, 0o755); err != nil {
			return err
		}
		for j := range many {
			if err := os.WriteFile(filepath.Join(dir, fmt.Sprint(j)), make([]byte, 100*j), 0o600); err != nil {
				return err
			}
		}
	}
	return nil
}

// fill takes all of the blocks.
func fill(o Options) error {
	f, err := os.Create(filepath.Join(o.Dir, "large"))
	if err != nil {
		return err
	}
	defer f.Close()
	for at, size := int64(0), int64(1<<30); size >= blockSize; {
		switch err := unix.Fallocate(int(f.Fd()), 0, at, size); {
		case err == nil:
			at += size
		case errors.Is(err, unix.ENOSPC):
			size /= 2
		default:
			return err
		}
	}
	var s unix.Statfs_t
	if err := unix.Statfs(o.Dir, &s); err != nil {
		return err
	}
	if s.Bavail > 0 {
		return fmt.Errorf("%d blocks are left", s.Bavail)
	}
	return nil
}

func remove(o Options) error {
	for i := range many / 2 {
		if err := os.RemoveAll(filepath.Join(o.Dir, fmt.Sprint("directory ", i))); err != nil {
			return err
		}
	}
	return os.Remove(filepath.Join(o.Dir, "large"))
}

// fsxattr and the rest is of linux/fs.h.
type fsxattr struct {
	xflags, _, _, projid, _ uint32
	_                       [8]byte
}

const (
	fsGetXattr   = 0x801c581f // FS_IOC_FSGETXATTR
	fsSetXattr   = 0x401c5820 // FS_IOC_FSSETXATTR
	projInherit  = 0x200      // FS_XFLAG_PROJINHERIT
	setQuota     = 0x800008   // Q_SETQUOTA, linux/quota.h
	getQuota     = 0x800007   // Q_GETQUOTA
	projectQuota = 2          // PRJQUOTA
	blockLimits  = 1          // QIF_BLIMITS
	inodeLimits  = 4          // QIF_ILIMITS
)

// dqblk is struct if_dqblk; limits of space are in 1024 bytes.
type dqblk struct {
	spaceHard, spaceSoft, space, inodeHard, inodeSoft, inodes, _, _ uint64
	valid, _                                                        uint32
}

func quota(o Options, command uintptr, d *dqblk) error {
	device, err := unix.BytePtrFromString(o.Device)
	if err != nil {
		return err
	}
	_, _, errno := unix.Syscall6(unix.SYS_QUOTACTL, command<<8|projectQuota, uintptr(unsafe.Pointer(device)), project,
		uintptr(unsafe.Pointer(d)), 0, 0)
	if errno != 0 {
		return fmt.Errorf("quotactl 0x%x: %w", command, errno)
	}
	return nil
}

func xattr(path string, request uintptr, x *fsxattr) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), request, uintptr(unsafe.Pointer(x))); errno != 0 {
		return fmt.Errorf("ioctl 0x%x on %s: %w", request, path, errno)
	}
	return nil
}

func limitedDir(o Options) string { return filepath.Join(o.Dir, "limited") }

// limited makes a directory of a project with limits and exceeds them.
func limited(o Options) error {
	dir := limitedDir(o)
	if err := os.Mkdir(dir, 0o777); err != nil {
		return err
	}
	if err := xattr(dir, fsSetXattr, &fsxattr{xflags: projInherit, projid: project}); err != nil {
		return err
	}
	err := quota(o, setQuota, &dqblk{spaceHard: limitBytes / 1024, inodeHard: limitInodes, valid: blockLimits | inodeLimits})
	if err != nil {
		return err
	}
	var s unix.Statfs_t
	if err := unix.Statfs(dir, &s); err != nil {
		return err
	}
	if s.Blocks != limitBytes/blockSize || s.Bfree != s.Blocks-1 || s.Files != limitInodes || s.Ffree != limitInodes-1 {
		return fmt.Errorf("statfs of a directory with limits says %+v", s)
	}
	return unprivileged(func() error {
		written, err := exceedSpace(filepath.Join(dir, "0"))
		if !errors.Is(err, unix.EDQUOT) {
			return fmt.Errorf("%d bytes were written in the limits, then: %w", written, err)
		}
		if written > limitBytes || written < limitBytes-limitBytes/16 {
			return fmt.Errorf("%d bytes were written", written)
		}
		for i := 1; ; i++ {
			err := os.WriteFile(filepath.Join(dir, fmt.Sprint(i)), nil, 0o600)
			if i < limitInodes-1 && err != nil || i == limitInodes-1 && !errors.Is(err, unix.EDQUOT) {
				return fmt.Errorf("file %d in the limits: %w", i, err)
			}
			if err != nil {
				break
			}
		}
		var x fsxattr
		if err := xattr(filepath.Join(dir, "1"), fsGetXattr, &x); err != nil {
			return err
		}
		if x.projid != project {
			return fmt.Errorf("a file in the directory is of project %d", x.projid)
		}
		return nil
	})
}

func exceedSpace(path string) (written int64, err error) {
	f, err := os.Create(path)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	for b := make([]byte, 64<<10); written <= 2*limitBytes; {
		n, err := f.Write(b)
		written += int64(n)
		if err != nil {
			return written, err
		}
	}
	return written, f.Sync()
}

// account compares the usage on record with what is there.
func account(o Options) error {
	d, err := os.Open(limitedDir(o))
	if err != nil {
		return err
	}
	defer d.Close()
	if err := unix.Syncfs(int(d.Fd())); err != nil {
		return err
	}
	names, err := d.Readdirnames(-1)
	if err != nil {
		return err
	}
	inodes, space := uint64(0), uint64(0)
	for _, name := range append(names, ".") {
		var s unix.Stat_t
		if err := unix.Lstat(filepath.Join(d.Name(), name), &s); err != nil {
			return err
		}
		inodes++
		space += uint64(s.Blocks) * 512
	}
	var q dqblk
	if err := quota(o, getQuota, &q); err != nil {
		return err
	}
	if inodes != limitInodes || q.inodes != inodes || q.space != space {
		return fmt.Errorf("the quota is %+v, in use are %d bytes and %d inodes", q, space, inodes)
	}
	return nil
}

// unprivileged calls do on a thread without CAP_SYS_RESOURCE, with which no limit counts.
func unprivileged(do func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
		header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		var data [2]unix.CapUserData
		err := unix.Capget(&header, &data[0])
		if err == nil {
			data[0].Effective &^= 1 << unix.CAP_SYS_RESOURCE
			err = unix.Capset(&header, &data[0])
		}
		if err == nil {
			err = do()
		}
		done <- err
	}()
	return <-done
}

// noErrors asks whether the kernel found anything wrong.
func noErrors(device string) error {
	for _, count := range []string{"errors_count", "warning_count"} {
		path := filepath.Join("/sys/fs/ext4", filepath.Base(device), count)
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		if n := strings.TrimSpace(string(b)); n != "0" {
			return fmt.Errorf("%s is %s", path, n)
		}
	}
	return nil
}
