// SPDX-License-Identifier: Apache-2.0

package hostcgroup

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// hierarchy is one mounted tree of cgroups.
type hierarchy struct {
	mount string
	v2    bool
	// controllers of version 1: "cpu,cpuacct", "name=systemd". Empty for version 2.
	controllers []string
}

func (h hierarchy) String() string {
	if h.v2 {
		return "unified"
	}
	return strings.Join(h.controllers, ",")
}

func (h hierarchy) has(controller string) bool {
	return slices.Contains(h.controllers, controller)
}

// v1Options are the super block's options that are no controllers.
var v1Options = [...]string{"rw", "ro", "xattr", "noprefix", "clone_children", "cpuset_v2_mode", "nsdelegate", "seclabel"}

// mounted lists the hierarchies of this mount namespace, each once.
func mounted() ([]hierarchy, error) {
	mounts, err := mountinfo.GetMounts(mountinfo.FSTypeFilter("cgroup", "cgroup2"))
	if err != nil {
		return nil, fmt.Errorf("read the mount table: %w", err)
	}
	var all []hierarchy
	seen := map[string]bool{}
	for _, m := range mounts {
		h := hierarchy{mount: m.Mountpoint, v2: m.FSType == "cgroup2"}
		if !h.v2 {
			for o := range strings.SplitSeq(m.VFSOptions, ",") {
				if name, _, _ := strings.Cut(o, "="); name != "release_agent" && !slices.Contains(v1Options[:], o) {
					h.controllers = append(h.controllers, o)
				}
			}
		}
		if !seen[h.String()] {
			seen[h.String()] = true
			all = append(all, h)
		}
	}
	if len(all) == 0 {
		return nil, fmt.Errorf("no cgroup hierarchy is mounted; mount one at /sys/fs/cgroup: %w", errdefs.ErrFailedPrecondition)
	}
	return all, nil
}

// forbidden tells errors that mean "not here, not by us".
func forbidden(err error) bool {
	return errors.Is(err, unix.EPERM) || errors.Is(err, unix.EACCES) || errors.Is(err, unix.EROFS)
}

// madeMark is the extended attribute of parents that this package made.
const madeMark = "trusted.cloister"

// make makes path and its missing parents in the hierarchy. A path that exists gives an error that wraps
// errdefs.ErrAlreadyExists.
func (h hierarchy) make(ctx context.Context, path string) error {
	parts := strings.Split(strings.Trim(path, "/"), "/")
	// A neighbour's Delete may take away a marked parent in between: ENOENT, or ENODEV from the files of a parent that
	// is being removed. The leaf is not made then, and a parent with a leaf does not go.
	const tries = 64
	var err error
	for range tries {
		if err = h.makeOnce(ctx, parts); !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.ENODEV) {
			return err
		}
	}
	return err
}

func (h hierarchy) makeOnce(ctx context.Context, parts []string) error {
	dir := h.mount
	for k, part := range parts {
		if h.v2 {
			h.delegate(ctx, dir)
		}
		parent := dir
		dir = filepath.Join(dir, part)
		leaf := k == len(parts)-1
		err := os.Mkdir(dir, 0o755)
		switch {
		case errors.Is(err, os.ErrExist) && leaf:
			return fmt.Errorf("cgroup %s belongs to another pod or was left by one (remove it if it is empty: rmdir): %w", dir,
				errdefs.ErrAlreadyExists)
		case errors.Is(err, os.ErrExist):
		case err != nil:
			return fmt.Errorf("make cgroup: %w", err)
		case !leaf:
			if err := unix.Setxattr(dir, madeMark, []byte("1"), 0); err != nil {
				log.G(ctx).WithError(err).WithField("cgroup", dir).Debug("a parent cgroup cannot be marked; it will stay after the pod")
			}
		}
		if h.has("cpuset") {
			if err := inheritCpuset(parent, dir); err != nil {
				return err
			}
		}
	}
	return nil
}

// delegate gives the children of dir the controllers that dir has (version 2). One that cannot be given, because dir
// has processes or is not ours, is not accounted in the child: no reason to fail.
func (h hierarchy) delegate(ctx context.Context, dir string) {
	has, err := os.ReadFile(filepath.Join(dir, "cgroup.controllers"))
	if err != nil {
		return
	}
	given, _ := os.ReadFile(filepath.Join(dir, "cgroup.subtree_control"))
	for _, c := range [...]string{"cpu", "memory", "pids", "io"} {
		if !slices.Contains(strings.Fields(string(has)), c) || slices.Contains(strings.Fields(string(given)), c) {
			continue
		}
		if err := writeFile(filepath.Join(dir, "cgroup.subtree_control"), "+"+c); err != nil {
			log.G(ctx).WithError(err).WithFields(log.Fields{"cgroup": dir, "controller": c}).Debug("controller cannot be given to the pod's cgroup")
		}
	}
}

// inheritCpuset fills a new cpuset from its parent's: version 1 makes it empty, and no process can join an empty one.
func inheritCpuset(parent, dir string) error {
	for _, name := range [...]string{"cpuset.cpus", "cpuset.mems"} {
		own, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			return fmt.Errorf("cpuset: %w", err)
		}
		if len(bytes.TrimSpace(own)) > 0 {
			continue
		}
		value, err := os.ReadFile(filepath.Join(parent, name))
		if err != nil {
			return fmt.Errorf("cpuset: %w", err)
		}
		if len(bytes.TrimSpace(value)) == 0 {
			continue // of a root without memory nodes; nothing to inherit
		}
		if err := writeFile(filepath.Join(dir, name), string(bytes.TrimSpace(value))); err != nil {
			return fmt.Errorf("cpuset: %w", err)
		}
	}
	return nil
}

// join moves a process. The whole process moves, and what it starts later begins there.
func (h hierarchy) join(path string, pid int) error {
	return writeFile(filepath.Join(h.mount, path, "cgroup.procs"), fmt.Sprint(pid))
}

// remove removes path once it is empty, then the marked parents that are empty too.
func (h hierarchy) remove(ctx context.Context, path string) error {
	dir := filepath.Join(h.mount, path)
	if err := h.removeWaiting(ctx, dir); err != nil {
		return err
	}
	for up := filepath.Dir(dir); len(up) > len(h.mount); up = filepath.Dir(up) {
		if n, err := unix.Getxattr(up, madeMark, nil); err != nil || n <= 0 {
			break
		}
		// EBUSY: a neighbour lives there, or comes right now.
		if err := unix.Rmdir(up); err != nil {
			break
		}
	}
	return nil
}

func (h hierarchy) removeWaiting(ctx context.Context, dir string) error {
	const longest = 250 * time.Millisecond
	for delay := 2 * time.Millisecond; ; delay = min(2*delay, longest) {
		err := removeTree(dir)
		if err == nil || errors.Is(err, unix.ENOENT) {
			return nil
		}
		if !errors.Is(err, unix.EBUSY) {
			return fmt.Errorf("remove cgroup %s: %w", dir, err)
		}
		if ctx.Err() != nil {
			return fmt.Errorf("remove cgroup %s: still in use by processes %v: %w", dir, processes(dir), ctx.Err())
		}
		h.wait(ctx, dir, delay)
	}
}

// wait returns when the cgroup may have become empty, after delay, or with ctx. Version 2 reports the change in
// cgroup.events (POLLPRI, kernel's admin-guide/cgroup-v2.rst, "[Un]populated Notification"); version 1 has nothing
// like it.
func (h hierarchy) wait(ctx context.Context, dir string, delay time.Duration) {
	if h.v2 {
		f, err := os.Open(filepath.Join(dir, "cgroup.events"))
		if err == nil {
			defer f.Close()
			// Reading arms the poll: kernfs compares with the state that this very file was read in.
			events, _ := io.ReadAll(f)
			if bytes.Contains(events, []byte("populated 1")) {
				fds := []unix.PollFd{{Fd: int32(f.Fd()), Events: unix.POLLPRI}}
				if _, err := unix.Poll(fds, int(delay.Milliseconds())); err == nil || errors.Is(err, unix.EINTR) {
					return
				}
			}
		}
	}
	t := time.NewTimer(delay)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}

// removeTree removes dir and the cgroups below it. Their files go with the directories.
func removeTree(dir string) error {
	err := unix.Rmdir(dir)
	if !errors.Is(err, unix.EBUSY) {
		return err
	}
	entries, readErr := os.ReadDir(dir)
	if readErr != nil {
		return err
	}
	for _, e := range entries {
		if e.IsDir() {
			if err := removeTree(filepath.Join(dir, e.Name())); err != nil && !errors.Is(err, unix.ENOENT) {
				return err
			}
		}
	}
	return unix.Rmdir(dir)
}

// processes lists the process ids in dir, for a message.
func processes(dir string) []string {
	data, _ := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
	pids := strings.Fields(string(data))
	const most = 16
	return pids[:min(len(pids), most)]
}

// writeFile writes in one write to a file that exists; os.WriteFile would make or truncate it.
func writeFile(path, value string) error {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(value)
	return errors.Join(err, f.Close())
}
