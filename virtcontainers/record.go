// SPDX-License-Identifier: Apache-2.0

package virtcontainers

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/log"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/cloister-project/cloister/virtcontainers/hooks"
	"github.com/cloister-project/cloister/virtcontainers/hostcgroup"
	"github.com/cloister-project/cloister/virtcontainers/network"
)

// recordName is the file in a sandbox's bundle that tells what the sandbox holds on the host.
const recordName = "cloister.json"

// record is what Cleanup needs when the shim was killed. What dies with the shim or with its own last user (the VMM,
// taps, virtiofsd and its mounts, a network namespace made by the shim) is here only where somebody must wait for it.
type record struct {
	ID        string       `json:"id"`
	StateDir  string       `json:"state_dir"`
	NetNSPath string       `json:"netns_path,omitempty"`
	Cgroup    string       `json:"cgroup,omitempty"`
	VMM       *processRef  `json:"vmm,omitempty"`
	Hooks     *specs.Hooks `json:"hooks,omitempty"`
}

// processRef names a process beyond the reuse of its pid.
type processRef struct {
	PID int `json:"pid"`
	// Start is the process's start time in clock ticks since boot (proc(5), /proc/pid/stat field 22).
	Start string `json:"start"`
}

// saveRecord writes the pod's record by atomic rename.
func (p *Pod) saveRecord() error {
	r := record{ID: p.cfg.ID, StateDir: p.stateDir, Hooks: p.cfg.Hooks}
	if p.cfg.Network == NetworkPath {
		r.NetNSPath = p.cfg.NetNSPath
	}
	if p.cgroup != nil {
		r.Cgroup = p.cgroup.Path()
	}
	if pid := p.vmmPID; pid != 0 {
		start, err := startTime(pid)
		if err != nil {
			return err
		}
		r.VMM = &processRef{PID: pid, Start: start}
	}
	b, err := json.Marshal(r)
	if err != nil {
		return err
	}
	path := filepath.Join(p.cfg.Bundle, recordName)
	if err := os.WriteFile(path+".tmp", b, 0o600); err != nil {
		return fmt.Errorf("record of the sandbox: %w", err)
	}
	return os.Rename(path+".tmp", path)
}

func removeRecord(bundle string) { _ = os.Remove(filepath.Join(bundle, recordName)) }

// Cleanup removes what a sandbox whose shim has died left on the host, from the record in its bundle alone. A bundle
// without one has nothing to remove. It may be repeated; all faults are reported together.
func Cleanup(ctx context.Context, bundle string) error {
	b, err := os.ReadFile(filepath.Join(bundle, recordName))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	var r record
	if err := json.Unmarshal(b, &r); err != nil {
		return fmt.Errorf("%s: %w", filepath.Join(bundle, recordName), err)
	}
	var faults []error
	if r.VMM != nil {
		if err := endProcess(ctx, *r.VMM); err != nil {
			faults = append(faults, err)
		}
	}
	if err := network.Cleanup(r.NetNSPath); err != nil {
		faults = append(faults, err)
	}
	if r.Cgroup != "" {
		if err := hostcgroup.DeleteByPath(ctx, r.Cgroup); err != nil {
			faults = append(faults, err)
		}
	}
	if r.Hooks != nil {
		hooks.Poststop(ctx, r.Hooks, hookState(r.ID, bundle, 0, nil))
	}
	if r.StateDir != "" {
		if err := os.RemoveAll(r.StateDir); err != nil {
			faults = append(faults, err)
		}
	}
	if err := errors.Join(faults...); err != nil {
		return err
	}
	removeRecord(bundle)
	return nil
}

// endProcess kills the process, if it is still the one that was meant, and waits until it is gone.
func endProcess(ctx context.Context, ref processRef) error {
	fd, err := unix.PidfdOpen(ref.PID, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("open process %d: %w", ref.PID, err)
	}
	defer unix.Close(fd)
	if start, err := startTime(ref.PID); err != nil || start != ref.Start {
		return nil // gone, or another process has the pid by now
	}
	log.G(ctx).WithField("pid", ref.PID).Warn("the VMM outlived its shim; killing it")
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("kill process %d: %w", ref.PID, err)
	}
	for {
		timeout := -1
		if d, ok := deadlineMillis(ctx); ok {
			timeout = d
		}
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, timeout)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return err
		case n == 0:
			return fmt.Errorf("process %d does not end: %w", ref.PID, context.DeadlineExceeded)
		default:
			return nil
		}
	}
}

// startTime reads field 22 of /proc/pid/stat. The second field is in brackets and may hold anything.
func startTime(pid int) (string, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return "", err
	}
	s := string(b)
	fields := strings.Fields(s[strings.LastIndexByte(s, ')')+1:])
	if len(fields) < 20 {
		return "", fmt.Errorf("/proc/%d/stat has %d fields after the name", pid, len(fields))
	}
	return fields[19], nil
}

// deadlineMillis is the time left until ctx's deadline, at least 1 ms once it has passed.
func deadlineMillis(ctx context.Context) (int, bool) {
	d, ok := ctx.Deadline()
	if !ok {
		return 0, false
	}
	return max(int(time.Until(d).Milliseconds()), 1), true
}
