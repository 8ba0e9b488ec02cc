// SPDX-License-Identifier: Apache-2.0

package cloudhypervisor

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/cloister-project/cloister/hypervisor"
	"github.com/cloister-project/cloister/hypervisor/supervise"
)

// mountNS is the mount namespace of a VMM under landlock. Landlock's rules are set once, before the guest runs, and name
// directories; where the disks of later containers lie on the host is not known then. So they are mounted, when they come, below
// a directory that the rules name, in a namespace that only the VMM is in: the host sees none of these mounts, and the last of
// them is gone with the VMM, however it ends.
type mountNS struct {
	dir string // the directory of hot-plugged disks, an empty one on the host
	ns  *os.File
}

// enter makes the calling thread's mount namespace a new one; for supervise.Command.Prepare. Later unmounts on the host take
// place in it as well, so that it keeps nothing of the host busy.
func (m *mountNS) enter() error {
	if err := unix.Unshare(unix.CLONE_FS | unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("make a mount namespace: %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
		return fmt.Errorf("separate the mount namespace from the host's: %w", err)
	}
	// Empty files and two directories; contents are never written.
	if err := unix.Mount("cloister", m.dir, "tmpfs", unix.MS_NOSUID|unix.MS_NOEXEC, "mode=0700,size=64k,nr_inodes=1024"); err != nil {
		return fmt.Errorf("mount a tmpfs for disks: %w", err)
	}
	for _, d := range []string{readOnlyDir, writableDir} {
		if err := unix.Mkdir(filepath.Join(m.dir, d), 0o700); err != nil {
			return fmt.Errorf("directory for disks: %w", err)
		}
	}
	ns, err := os.Open("/proc/thread-self/ns/mnt")
	if err != nil {
		return fmt.Errorf("mount namespace: %w", err)
	}
	m.ns = ns
	return nil
}

func (m *mountNS) close() {
	if m.ns != nil {
		_ = m.ns.Close()
	}
}

// path is where the VMM finds a disk.
func (m *mountNS) path(d hypervisor.Disk) string {
	if d.ReadOnly {
		return filepath.Join(m.dir, readOnlyDir, d.ID)
	}
	return filepath.Join(m.dir, writableDir, d.ID)
}

// attach mounts an image of the host where the VMM finds it.
func (m *mountNS) attach(d hypervisor.Disk, i *image) error {
	tree, err := unix.OpenTree(int(i.file.Fd()), "", unix.AT_EMPTY_PATH|unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return fmt.Errorf("open_tree: %w", err)
	}
	defer unix.Close(tree)
	attr := unix.MountAttr{Propagation: unix.MS_PRIVATE}
	if d.ReadOnly {
		attr.Attr_set = unix.MOUNT_ATTR_RDONLY
	}
	if err := unix.MountSetattr(tree, "", unix.AT_EMPTY_PATH, &attr); err != nil {
		return fmt.Errorf("mount_setattr (needs Linux 5.12): %w", err)
	}
	path := m.path(d)
	return m.do(func() error {
		if err := unix.Mknod(path, unix.S_IFREG|0o400, 0); err != nil {
			return fmt.Errorf("make a mount point: %w", err)
		}
		if err := unix.MoveMount(tree, "", unix.AT_FDCWD, path, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
			return errors.Join(fmt.Errorf("move_mount: %w", err), unix.Unlink(path))
		}
		return nil
	})
}

// detach is the reverse of attach. What the VMM has open stays so.
func (m *mountNS) detach(d hypervisor.Disk) error {
	path := m.path(d)
	return m.do(func() error {
		if err := unix.Unmount(path, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil {
			return fmt.Errorf("unmount the disk: %w", err)
		}
		if err := unix.Unlink(path); err != nil {
			return fmt.Errorf("remove a mount point: %w", err)
		}
		return nil
	})
}

// do calls f on a thread in the namespace. Mounting waits for nothing but the kernel.
func (m *mountNS) do(f func() error) error {
	result := make(chan error, 1)
	supervise.OnOwnThread(func() {
		// A thread that shares its root and working directory with others cannot change its namespace.
		err := unix.Unshare(unix.CLONE_FS)
		if err == nil {
			err = unix.Setns(int(m.ns.Fd()), unix.CLONE_NEWNS)
		}
		if err != nil {
			result <- fmt.Errorf("enter the VMM's mount namespace: %w", err)
			return
		}
		result <- f()
	})
	return <-result
}
