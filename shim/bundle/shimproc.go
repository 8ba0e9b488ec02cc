// SPDX-License-Identifier: Apache-2.0

package bundle

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// shimProcess names a process for good: process ids are used again, so that the time of its start goes with it.
type shimProcess struct {
	PID int `json:"pid"`
	// StartTime is field 22 of /proc/<pid>/stat, in clock ticks since boot.
	StartTime uint64 `json:"startTime"`
	// Sockets that it listens on, as "unix://<path>".
	Sockets []string `json:"sockets,omitempty"`
}

// WriteShim keeps who serves the bundle's pod, and where.
func WriteShim(dir string, pid int, sockets ...string) error {
	start, err := startTime(pid)
	if err != nil {
		return err
	}
	return writeJSON(filepath.Join(dir, shimFile), shimProcess{pid, start, sockets})
}

// ForgetShim makes EndShim on the bundle do nothing: the daemon lives on for others.
func ForgetShim(dir string) error {
	if err := os.Remove(filepath.Join(dir, shimFile)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// EndShim waits up to grace for the daemon of the bundle's pod to end by itself, as it does after Shutdown, and kills
// it then. containerd runs `delete` for a pod that is to go, whether or not the daemon still answers. Sockets that the
// daemon left are removed.
func EndShim(ctx context.Context, dir string, grace time.Duration) error {
	var p shimProcess
	if err := readJSON(filepath.Join(dir, shimFile), maxSmallBytes, &p); err != nil {
		if errdefs.IsNotFound(err) {
			return nil
		}
		return err
	}
	if err := p.end(ctx, grace); err != nil {
		return err
	}
	var errs []error
	for _, socket := range p.Sockets {
		if err := os.Remove(strings.TrimPrefix(socket, "unix://")); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, fmt.Errorf("remove the shim's socket: %w", err))
		}
	}
	return errors.Join(errs...)
}

func (p shimProcess) end(ctx context.Context, grace time.Duration) error {
	if p.PID <= 1 || p.PID == os.Getpid() {
		return nil
	}
	fd, err := unix.PidfdOpen(p.PID, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("open shim process %d: %w", p.PID, err)
	}
	defer unix.Close(fd)
	// The pidfd pins whoever has the pid now; only then is the start time a proof.
	if start, err := startTime(p.PID); err != nil || start != p.StartTime {
		return nil
	}
	if gone, err := waitPidfd(ctx, fd, grace); gone || err != nil {
		return err
	}
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("kill shim process %d: %w", p.PID, err)
	}
	if gone, err := waitPidfd(ctx, fd, time.Second); !gone {
		return errors.Join(fmt.Errorf("shim process %d does not end after SIGKILL", p.PID), err)
	}
	return nil
}

// waitPidfd tells whether the process ended within the time.
func waitPidfd(ctx context.Context, fd int, d time.Duration) (bool, error) {
	deadline := time.Now().Add(d)
	if t, ok := ctx.Deadline(); ok && t.Before(deadline) {
		deadline = t
	}
	fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	for {
		n, err := unix.Poll(fds, int(max(time.Until(deadline).Milliseconds(), 0)))
		if errors.Is(err, unix.EINTR) {
			continue
		}
		return n > 0, err
	}
}

func startTime(pid int) (uint64, error) {
	data, err := readFile(filepath.Join("/proc", strconv.Itoa(pid), "stat"), maxSmallBytes)
	if err != nil {
		return 0, err
	}
	// The command's name, in brackets, can hold anything; fields are counted from behind it. See proc_pid_stat(5).
	i := bytes.LastIndexByte(data, ')')
	fields := bytes.Fields(data[i+1:])
	if i < 0 || len(fields) < 20 {
		return 0, fmt.Errorf("/proc/%d/stat has an unknown format", pid)
	}
	return strconv.ParseUint(string(fields[19]), 10, 64)
}
