// SPDX-License-Identifier: Apache-2.0

package boot

import (
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// Where the agent's executable lives after the boot.
const (
	agentDir  = "/agent"
	agentFile = agentDir + "/cloister-agent"
)

// newRoot is where the new root is put together, in the initramfs.
const newRoot = "/newroot"

// fsMount is a file system of the guest's root; target is below newRoot.
type fsMount struct {
	fstype, target string
	flags          uintptr
	data           string
}

const hardened = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC

// rootMounts stand in order. /run is not noexec: libcontainer seals executables there where it finds no overlayfs.
var rootMounts = []fsMount{
	// Directories only, so small; nothing of a container ever lies in it.
	{"tmpfs", "", unix.MS_NOSUID | unix.MS_NODEV, "mode=0755,size=1m"},
	{"proc", "/proc", hardened, ""},
	{"sysfs", "/sys", hardened, ""},
	{"cgroup2", "/sys/fs/cgroup", hardened, "nsdelegate,memory_recursiveprot"},
	{"devtmpfs", "/dev", unix.MS_NOSUID | unix.MS_NOEXEC, "mode=0755"},
	{"devpts", "/dev/pts", unix.MS_NOSUID | unix.MS_NOEXEC, "newinstance,gid=5,mode=0620,ptmxmode=0666"},
	{"tmpfs", "/dev/shm", hardened, "mode=1777"},
	{"tmpfs", "/run", unix.MS_NOSUID | unix.MS_NODEV, "mode=0755"},
}

// enterRoot builds the new root and makes it the root and working directory of the process.
func enterRoot() error {
	// The mask that the kernel gives its first process is 0; be sure, modes below are meant as they stand.
	unix.Umask(0)
	for _, m := range rootMounts {
		target := newRoot + m.target
		// Mount points of proc, sysfs and cgroup2 exist already or are in our tmpfs; those in devtmpfs may be new.
		if err := os.MkdirAll(target, 0o755); err != nil {
			return fmt.Errorf("make a mount point: %w", err)
		}
		if err := unix.Mount(m.fstype, target, m.fstype, m.flags, m.data); err != nil {
			return fmt.Errorf("mount %s at %s (options %q): %w", m.fstype, target, m.data, err)
		}
	}
	if err := os.Mkdir(newRoot+"/tmp", 0o1777); err != nil {
		return err
	}
	for _, l := range [][2]string{{"/proc/self/fd", "fd"}, {"fd/0", "stdin"}, {"fd/1", "stdout"}, {"fd/2", "stderr"}} {
		if err := os.Symlink(l[0], filepath.Join(newRoot, "dev", l[1])); err != nil {
			return err
		}
	}

	// The running executable stays where it is in memory and is made visible at the same path before and after.
	if err := os.Mkdir(agentDir, 0o555); err != nil {
		return err
	}
	if err := os.Rename("/init", agentFile); err != nil {
		return fmt.Errorf("the agent is not /init of the initramfs: %w", err)
	}
	if err := os.Mkdir(newRoot+agentDir, 0o555); err != nil {
		return err
	}
	if err := unix.Mount(agentDir, newRoot+agentDir, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("bind mount %s into the new root: %w", agentDir, err)
	}
	if err := unix.Mount("", newRoot+agentDir, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY|unix.MS_NOSUID|unix.MS_NODEV, ""); err != nil {
		return fmt.Errorf("make %s read-only: %w", agentDir, err)
	}

	if err := unix.Chdir(newRoot); err != nil {
		return err
	}
	if err := unix.Mount(".", "/", "", unix.MS_MOVE, ""); err != nil {
		return fmt.Errorf("move the new root over the initramfs: %w", err)
	}
	if err := unix.Chroot("."); err != nil {
		return fmt.Errorf("enter the new root: %w", err)
	}
	// Further processes of containers inherit the mask where their specification has none: as with runc on a host.
	unix.Umask(0o022)
	return unix.Chdir("/")
}
