// SPDX-License-Identifier: Apache-2.0

package share

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// makeWritable takes the read-only flag from the mount that has the name. Flags do not propagate as mounts do, so it is done in each
// mount namespace that has a copy. It runs on the namespace's thread.
func (s *Share) makeWritable(name string) error {
	if err := writable(s.ns.served, name); err != nil {
		return err
	}
	// virtiofsd first, then what it forks: what is forked meanwhile copies what has been done.
	for pids := []int{s.PID()}; len(pids) > 0; pids = pids[1:] {
		if err := inMountNamespace(pids[0], func() error {
			// Before it drops the host's tree, and after.
			err := writable(unix.AT_FDCWD, filepath.Join(s.served, name))
			if errors.Is(err, unix.ENOENT) {
				err = writable(unix.AT_FDCWD, "/"+name)
			}
			return err
		}); err != nil {
			return fmt.Errorf("in the mount namespace of process %d: %w", pids[0], err)
		}
		forked, err := children(pids[0])
		if err != nil {
			return err
		}
		pids = append(pids, forked...)
	}
	return nil
}

func writable(dir int, path string) error {
	return unix.MountSetattr(dir, path, unix.AT_SYMLINK_NOFOLLOW, &unix.MountAttr{Attr_clr: unix.MOUNT_ATTR_RDONLY})
}

// inMountNamespace calls f on a thread in the mount namespace of a process, with that namespace's root, unless the process has ended.
func inMountNamespace(pid int, f func() error) error {
	result := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with this function
		result <- func() error {
			ns, err := unix.Open(fmt.Sprintf("/proc/%d/ns/mnt", pid), unix.O_RDONLY|unix.O_CLOEXEC, 0)
			if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ESRCH) {
				return nil
			}
			if err != nil {
				return err
			}
			defer unix.Close(ns)
			if err := unix.Unshare(unix.CLONE_FS); err != nil {
				return fmt.Errorf("unshare: %w", err)
			}
			if err := unix.Setns(ns, unix.CLONE_NEWNS); err != nil {
				return fmt.Errorf("setns: %w", err)
			}
			return f()
		}()
	}()
	return <-result
}

// children returns the processes that a process has forked and that still run (proc_pid_children(5)).
func children(pid int) ([]int, error) {
	lists, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	if err != nil {
		return nil, err
	}
	var all []int
	for _, list := range lists {
		b, err := os.ReadFile(list)
		if err != nil { // the thread has ended
			continue
		}
		for word := range strings.FieldsSeq(string(b)) {
			if child, err := strconv.Atoi(word); err == nil {
				all = append(all, child)
			}
		}
	}
	return all, nil
}
