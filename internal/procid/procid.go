// SPDX-License-Identifier: Apache-2.0

package procid

import (
	"context"
	"errors"
	"fmt"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Ref names one process.
type Ref struct {
	PID int
	// Start is Stat.Start.
	Start uint64
}

// Of returns the Ref of the process that has pid now. The caller must know that it is the one that is meant: its child
// that has not been reaped, for example, or itself.
func Of(pid int) (Ref, error) {
	s, err := ReadStat(pid)
	if err != nil {
		return Ref{}, fmt.Errorf("start time of process %d: %w", pid, err)
	}
	return Ref{PID: pid, Start: s.Start}, nil
}

// Process is a handle on one process, which it keeps from being mistaken for another.
type Process struct {
	pid int
	// file is the pidfd, in Go's poller.
	file *os.File
}

// Open opens the process. The error is os.ErrProcessDone if it is gone, or if another process has its pid by now.
func (r Ref) Open() (*Process, error) {
	if r.PID <= 0 {
		return nil, fmt.Errorf("process %d: %w", r.PID, os.ErrProcessDone)
	}
	fd, err := unix.PidfdOpen(r.PID, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil, fmt.Errorf("process %d: %w", r.PID, os.ErrProcessDone)
	}
	if err != nil {
		return nil, fmt.Errorf("open process %d: %w", r.PID, err)
	}
	// The pidfd pins whoever has the pid now. Only from here on is the start time a proof.
	if s, err := ReadStat(r.PID); err != nil || s.Start != r.Start {
		_ = unix.Close(fd)
		return nil, fmt.Errorf("process %d: %w", r.PID, os.ErrProcessDone)
	}
	if err := unix.SetNonblock(fd, true); err != nil { // else os.NewFile keeps it out of the poller
		_ = unix.Close(fd)
		return nil, fmt.Errorf("open process %d: %w", r.PID, err)
	}
	return &Process{pid: r.PID, file: os.NewFile(uintptr(fd), "pidfd")}, nil
}

// Close releases the handle. The process goes on.
func (p *Process) Close() error { return p.file.Close() }

// Signal sends a signal. The error is os.ErrProcessDone if the process is gone.
func (p *Process) Signal(signal unix.Signal) error {
	var sent error
	if err := p.control(func(fd int) { sent = unix.PidfdSendSignal(fd, signal, nil, 0) }); err != nil {
		return err
	}
	if errors.Is(sent, unix.ESRCH) {
		return fmt.Errorf("process %d: %w", p.pid, os.ErrProcessDone)
	}
	if sent != nil {
		return fmt.Errorf("signal process %d: %w", p.pid, sent)
	}
	return nil
}

func (p *Process) control(f func(fd int)) error {
	raw, err := p.file.SyscallConn()
	if err != nil {
		return err
	}
	return raw.Control(func(fd uintptr) { f(int(fd)) })
}

// Wait waits until the process has ended, as a zombie at least, or ctx ends. It does not reap.
func (p *Process) Wait(ctx context.Context) error {
	// A descriptor of its own: the deadline that wakes it up is not another Wait's.
	var fd int
	var err error
	if cerr := p.control(func(own int) { fd, err = unix.FcntlInt(uintptr(own), unix.F_DUPFD_CLOEXEC, 0) }); cerr != nil || err != nil {
		return fmt.Errorf("wait for process %d: %w", p.pid, errors.Join(cerr, err))
	}
	file := os.NewFile(uintptr(fd), "pidfd") // the status flags are shared with p.file
	defer file.Close()
	raw, err := file.SyscallConn()
	if err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { _ = file.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	var polled error
	err = raw.Read(func(fd uintptr) bool {
		var n int
		n, polled = poll(int(fd))
		return n > 0 || polled != nil
	})
	switch {
	case polled != nil:
		return fmt.Errorf("wait for process %d: %w", p.pid, polled)
	case err == nil:
		return nil
	case ctx.Err() != nil:
		// It may have ended before ctx did: a deadline that has passed leaves no look at the descriptor.
		if n, _ := poll(fd); n > 0 {
			return nil
		}
		return fmt.Errorf("process %d does not end: %w", p.pid, ctx.Err())
	}
	return fmt.Errorf("wait for process %d: %w", p.pid, err)
}

// poll reports, without waiting, whether a pidfd's process has ended.
func poll(fd int) (int, error) {
	for {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
		if !errors.Is(err, syscall.EINTR) {
			return n, err
		}
	}
}

// End waits up to grace for the process to end by itself, or for ctx's end if that comes first. Then it kills the process
// and waits until it is gone, or ctx ends. It reports whether it had to kill.
func (p *Process) End(ctx context.Context, grace time.Duration) (killed bool, err error) {
	if grace > 0 {
		gctx, cancel := context.WithTimeout(ctx, grace)
		defer cancel()
		if err := p.Wait(gctx); err == nil || gctx.Err() == nil {
			return false, err
		}
	}
	if err := p.Signal(unix.SIGKILL); err != nil {
		if errors.Is(err, os.ErrProcessDone) {
			return false, nil
		}
		return false, err
	}
	return true, p.Wait(ctx)
}
