// SPDX-License-Identifier: Apache-2.0

package container

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/cgroups/v3/cgroup2"
	"github.com/containerd/cgroups/v3/cgroup2/stats"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// cgroupMount is where the guest's only cgroup hierarchy, version 2, is mounted.
const cgroupMount = "/sys/fs/cgroup"

// cgroupStats reads the cgroup at path, relative to the hierarchy's root, "/" included.
func cgroupStats(path string) (*stats.Metrics, error) {
	if _, err := os.Stat(filepath.Join(cgroupMount, path, "cgroup.procs")); err != nil {
		return nil, fmt.Errorf("the cgroup %s cannot be read: %w", path, errors.Join(err, errdefs.ErrFailedPrecondition))
	}
	manager, err := cgroup2.Load(path)
	if err != nil {
		return nil, fmt.Errorf("load the cgroup %s: %w", path, err)
	}
	metrics, err := manager.Stat()
	if err != nil {
		return nil, fmt.Errorf("read the statistics of the cgroup %s: %w", path, err)
	}
	return metrics, nil
}

// killCgroup sends SIGKILL to everything in a cgroup and below, frozen or not. The error is os.ErrNotExist for a cgroup
// that is gone, and on a hierarchy of version 1.
func killCgroup(dir string) error {
	return os.WriteFile(filepath.Join(dir, "cgroup.kill"), []byte("1"), 0)
}

// waitCgroupEmpty waits until no process is left in a cgroup and below, at most for budget.
func waitCgroupEmpty(ctx context.Context, dir string, budget time.Duration) error {
	deadline := time.Now().Add(budget)
	events, err := os.Open(filepath.Join(dir, "cgroup.events"))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer events.Close()
	buf := make([]byte, 256)
	for {
		n, err := events.ReadAt(buf, 0)
		if errors.Is(err, unix.ENODEV) {
			return nil
		}
		if n == 0 && err != nil {
			return fmt.Errorf("read cgroup.events: %w", err)
		}
		if bytes.Contains(buf[:n], []byte("populated 0")) {
			return nil
		}
		left := time.Until(deadline)
		if left <= 0 {
			return fmt.Errorf("processes are left in the cgroup %s after %s: %w", dir, budget, errdefs.ErrUnavailable)
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		// The kernel reports a change of cgroup.events as POLLPRI. Short waits, so that ctx is honoured.
		wait := min(left, 200*time.Millisecond)
		if _, err := unix.Poll([]unix.PollFd{{Fd: int32(events.Fd()), Events: unix.POLLPRI}}, int(wait.Milliseconds())+1); err != nil &&
			err != unix.EINTR {
			return fmt.Errorf("poll cgroup.events: %w", err)
		}
	}
}
