// SPDX-License-Identifier: Apache-2.0

package harness

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// killBudget is how long the node's processes may take to disappear after SIGKILL.
const killBudget = 20 * time.Second

// killAll kills what belongs to the node until nothing is left. Each process is killed through a pidfd that was checked
// against its start time: a pid may have been given to somebody else since it was listed.
func (n *Node) killAll(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, killBudget)
	defer cancel()
	ticker := time.NewTicker(pollInterval)
	defer ticker.Stop()
	for {
		left, err := n.processes()
		left = slices.DeleteFunc(left, func(p process) bool { return !p.ours() })
		if err != nil || len(left) == 0 {
			return err
		}
		for _, p := range left {
			if err := p.kill(); err != nil {
				return err
			}
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("not killed after %s: %v", killBudget, left)
		case <-ticker.C:
		}
	}
}

func (p process) kill() error {
	handle, err := p.ref.Open()
	if err == nil {
		defer handle.Close()
		err = handle.Signal(unix.SIGKILL)
	}
	if err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("killing %s: %w", p, err)
	}
	return nil
}

// mounts of the node: mounted below its directory, or from it.
func (n *Node) mounts() ([]*mountinfo.Info, error) {
	return mountinfo.GetMounts(func(m *mountinfo.Info) (skip, stop bool) {
		return !n.within(m.Mountpoint) && !n.within(m.Source) && !strings.Contains(m.VFSOptions, n.Dir+"/"), false
	})
}

func (n *Node) unmountAll() error {
	mounts, err := n.mounts()
	if err != nil {
		return err
	}
	// The last mounted first.
	slices.Reverse(mounts)
	for _, m := range mounts {
		if err := unix.Unmount(m.Mountpoint, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil &&
			!errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("unmounting %s: %w", m.Mountpoint, err)
		}
	}
	return nil
}

// loops lists the loop devices ("/dev/loop3") that are backed by files of the node.
func (n *Node) loops() ([]string, error) {
	files, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		return nil, err
	}
	var devices []string
	for _, f := range files {
		backing, err := os.ReadFile(f)
		if err == nil && n.within(strings.TrimSpace(string(backing))) {
			devices = append(devices, "/dev/"+strings.Split(f, "/")[3])
		}
	}
	return devices, nil
}

func (n *Node) detachLoops(ctx context.Context) error {
	devices, err := n.loops()
	if err != nil {
		return err
	}
	for _, d := range devices {
		if err := run(ctx, "losetup", "-d", d); err != nil {
			return err
		}
	}
	return nil
}

func (n *Node) deleteNetns(ctx context.Context) error {
	if _, err := os.Lstat("/run/netns/" + n.Name); errors.Is(err, os.ErrNotExist) {
		return nil
	}
	return run(ctx, "ip", "netns", "delete", n.Name)
}

// cgroups of the node in all hierarchies, v1 and v2, parents before children.
func (n *Node) cgroups() ([]string, error) {
	var found []string
	err := filepath.WalkDir("/sys/fs/cgroup", func(path string, d fs.DirEntry, err error) error {
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ENODEV) {
			return nil // removed under our hands
		}
		if err != nil {
			return err
		}
		if d.IsDir() && strings.Contains(path, n.Name) {
			found = append(found, path)
		}
		return nil
	})
	return found, err
}

// removeCgroups waits, within killBudget, for processes that were killed and that init has not reaped yet: until then their
// cgroup is busy.
func (n *Node) removeCgroups(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, killBudget)
	defer cancel()
	ticker := time.NewTicker(pollInterval)
	defer ticker.Stop()
	groups, err := n.cgroups()
	if err != nil {
		return err
	}
	slices.Reverse(groups)
	for _, g := range groups {
		for {
			err := os.Remove(g)
			if err == nil || errors.Is(err, os.ErrNotExist) {
				break
			}
			if !errors.Is(err, unix.EBUSY) {
				return err
			}
			select {
			case <-ticker.C:
			case <-ctx.Done():
				return err
			}
		}
	}
	return nil
}

func removeMatches(pattern string) error {
	matches, err := filepath.Glob(pattern)
	if err != nil {
		return err
	}
	for _, m := range matches {
		if err := os.Remove(m); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	return nil
}
