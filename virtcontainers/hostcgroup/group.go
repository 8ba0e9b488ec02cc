// SPDX-License-Identifier: Apache-2.0

package hostcgroup

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"
)

// Group is a pod's cgroup, in one or more hierarchies.
type Group struct {
	path        string
	hierarchies []hierarchy
}

// Create makes the cgroup path (of Path or Parent) in all hierarchies. One that exists, in any of them, is an
// errdefs.ErrAlreadyExists: it belongs to another pod, or to a killed shim, for which DeleteByPath is meant. If Create
// fails, nothing of it is left.
func Create(ctx context.Context, path string) (*Group, error) {
	all, err := mounted()
	if err != nil {
		return nil, err
	}
	return create(ctx, all, path)
}

func create(ctx context.Context, all []hierarchy, path string) (*Group, error) {
	path, err := check(path, path)
	if err != nil {
		return nil, err
	}
	g := &Group{path: path}
	var refused []error
	for _, h := range all {
		err := h.make(ctx, path)
		switch {
		case err == nil:
			g.hierarchies = append(g.hierarchies, h)
		case forbidden(err):
			refused = append(refused, err)
			log.G(ctx).WithError(err).WithField("hierarchy", h.String()).Debug("the pod's cgroup is not made in this hierarchy")
		default:
			made := g.hierarchies
			if !errdefs.IsAlreadyExists(err) {
				made = append(made, h) // its leaf may be there, its setting up failed
			}
			undo := &Group{path: path, hierarchies: made}
			if uerr := undo.Delete(context.WithoutCancel(ctx)); uerr != nil {
				log.G(ctx).WithError(uerr).Warn("undo the making of the pod's cgroup")
			}
			return nil, err
		}
	}
	if len(g.hierarchies) == 0 {
		return nil, fmt.Errorf("cgroup %s can be made in no hierarchy: %w", path, errors.Join(refused...))
	}
	return g, nil
}

// Load finds the cgroup path where it exists. If it exists nowhere, the error is an errdefs.ErrNotFound.
func Load(path string) (*Group, error) {
	all, err := mounted()
	if err != nil {
		return nil, err
	}
	return load(all, path)
}

func load(all []hierarchy, path string) (*Group, error) {
	path, err := check(path, path)
	if err != nil {
		return nil, err
	}
	g := &Group{path: path}
	for _, h := range all {
		if _, err := os.Stat(filepath.Join(h.mount, path)); err == nil {
			g.hierarchies = append(g.hierarchies, h)
		}
	}
	if len(g.hierarchies) == 0 {
		return nil, fmt.Errorf("cgroup %s: %w", path, errdefs.ErrNotFound)
	}
	return g, nil
}

// Path is what DeleteByPath and Load take.
func (g *Group) Path() string { return g.path }

// AddProcess moves a process, all its threads included, into the cgroup. What it starts afterwards begins there; what
// it started before stays where it is. A process that does not exist (any more) gives an errdefs.ErrNotFound. A
// hierarchy that refuses for lack of permission is left out; if all do, that is an error.
func (g *Group) AddProcess(ctx context.Context, pid int) error {
	if pid <= 0 {
		return fmt.Errorf("process id %d: %w", pid, errdefs.ErrInvalidArgument) // 0 would move the shim itself
	}
	var refused []error
	for _, h := range g.hierarchies {
		err := h.join(g.path, pid)
		switch {
		case err == nil:
		case errors.Is(err, unix.ESRCH):
			return fmt.Errorf("process %d has ended; it cannot join cgroup %s: %w", pid, g.path, errdefs.ErrNotFound)
		case forbidden(err):
			refused = append(refused, err)
			log.G(ctx).WithError(err).WithFields(log.Fields{"hierarchy": h.String(),
				"pid": pid}).Debug("process does not join the pod's cgroup in this hierarchy")
		default:
			return fmt.Errorf("process %d cannot join cgroup %s of hierarchy %s: %w", pid, g.path, h, err)
		}
	}
	if len(refused) == len(g.hierarchies) {
		return fmt.Errorf("process %d can join cgroup %s in no hierarchy: %w", pid, g.path, errors.Join(refused...))
	}
	return nil
}

// Delete removes the cgroup everywhere, as soon as it is empty. It kills nothing; if processes are still there when ctx
// ends, the error names them and wraps ctx.Err(). A cgroup that is gone is no error.
func (g *Group) Delete(ctx context.Context) error {
	var errs []error
	for _, h := range g.hierarchies {
		if err := h.remove(ctx, g.path); err != nil {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// DeleteByPath is Delete for a cgroup of which only the path is known.
func DeleteByPath(ctx context.Context, path string) error {
	g, err := Load(path)
	if errdefs.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	return g.Delete(ctx)
}

// Stats is what the processes in a cgroup use on the host. A value whose controller is not there is 0.
type Stats struct {
	// CPU time since the cgroup was made; CPUUser and CPUSystem may not add up to it.
	CPU, CPUUser, CPUSystem time.Duration
	// Memory in bytes, page cache included; MemoryInactiveFile is the part that the kernel takes back first. What
	// Kubernetes calls the working set is their difference.
	Memory, MemoryInactiveFile uint64
	// MemoryPeak in bytes, the highest Memory so far.
	MemoryPeak uint64
	// Pids is the number of threads.
	Pids uint64
}

// Stats reads the counters. They are those of the VMM and its helpers, of which the guest's memory is a part.
func (g *Group) Stats() (Stats, error) {
	var s Stats
	found := false
	for _, h := range g.hierarchies {
		dir := g.hierarchyDir(h)
		if _, err := os.Stat(dir); err != nil {
			continue
		}
		found = true
		if h.v2 {
			s.readV2(dir)
		} else {
			s.readV1(h, dir)
		}
	}
	if !found {
		return s, fmt.Errorf("cgroup %s: %w", g.path, errdefs.ErrNotFound)
	}
	return s, nil
}

func (g *Group) hierarchyDir(h hierarchy) string { return filepath.Join(h.mount, g.path) }

func (s *Stats) readV2(dir string) {
	// On a hybrid host version 2 has cpu.stat without the controller, beside version 1's cpuacct: the same numbers.
	cpu := table(dir, "cpu.stat")
	if cpu["usage_usec"] > 0 {
		s.CPU = time.Duration(cpu["usage_usec"]) * time.Microsecond
		s.CPUUser = time.Duration(cpu["user_usec"]) * time.Microsecond
		s.CPUSystem = time.Duration(cpu["system_usec"]) * time.Microsecond
	}
	set(&s.Memory, number(dir, "memory.current"))
	set(&s.MemoryPeak, number(dir, "memory.peak"))
	set(&s.MemoryInactiveFile, table(dir, "memory.stat")["inactive_file"])
	set(&s.Pids, number(dir, "pids.current"))
}

// userHz is the unit of cpuacct.stat: the kernel's USER_HZ is 100 on all architectures Cloister runs on.
const userHz = 100

func (s *Stats) readV1(h hierarchy, dir string) {
	if h.has("cpuacct") {
		s.CPU = time.Duration(number(dir, "cpuacct.usage"))
		ticks := table(dir, "cpuacct.stat")
		s.CPUUser = time.Duration(ticks["user"]) * time.Second / userHz
		s.CPUSystem = time.Duration(ticks["system"]) * time.Second / userHz
	}
	if h.has("memory") {
		set(&s.Memory, number(dir, "memory.usage_in_bytes"))
		set(&s.MemoryPeak, number(dir, "memory.max_usage_in_bytes"))
		set(&s.MemoryInactiveFile, table(dir, "memory.stat")["total_inactive_file"])
	}
	if h.has("pids") {
		set(&s.Pids, number(dir, "pids.current"))
	}
}

func set(to *uint64, value uint64) {
	if value > 0 {
		*to = value
	}
}

// number reads a file with one number; 0 where there is none.
func number(dir, name string) uint64 {
	data, err := os.ReadFile(filepath.Join(dir, name))
	if err != nil {
		return 0
	}
	n, _ := strconv.ParseUint(strings.TrimSpace(string(data)), 10, 64)
	return n
}

// table reads a file of "key value" lines.
func table(dir, name string) map[string]uint64 {
	data, err := os.ReadFile(filepath.Join(dir, name))
	if err != nil {
		return nil
	}
	t := map[string]uint64{}
	for line := range strings.Lines(string(data)) {
		key, value, _ := strings.Cut(strings.TrimSpace(line), " ")
		if n, err := strconv.ParseUint(value, 10, 64); err == nil {
			t[key] = n
		}
	}
	return t
}
