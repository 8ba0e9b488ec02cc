// SPDX-License-Identifier: Apache-2.0

package boot

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// orphanGrace is how long an exited process is left to whoever may be about to wait for it.
	orphanGrace = 10 * time.Second
	// maxOrphans bounds the exited processes that are watched at one time; further ones come later.
	maxOrphans = 1024
)

// Reaper waits for processes that PID 1 inherited, and for no others.
//
// A process belongs to the thread that forked it, and orphans go to PID 1's main thread. Run sits on the main thread and
// looks only at that thread's children (__WNOTHREAD), so that it does not even see what other threads forked. Yet a
// thread's children come to the main thread too when the thread ends, which Go's threads do when a goroutine ends that
// is still locked to one; libraries do that. So a child of the main thread that has exited is reaped only when nobody
// else has waited for it for a while: in this program whoever starts a process waits for it all the time.
type Reaper struct {
	grace time.Duration
	// exited are processes that have exited, by pid. A file descriptor names a process for good, a pid does not.
	exited map[int]exitedProcess
}

type exitedProcess struct {
	pidfd int
	since time.Time
}

func newReaper() *Reaper {
	return &Reaper{grace: orphanGrace, exited: map[int]exitedProcess{}}
}

// Run reaps until ctx ends. It must be called once, from a goroutine that is locked to the process's main thread
// (runtime.LockOSThread in an init function) and that starts no process.
func (r *Reaper) Run(ctx context.Context) error {
	if unix.Gettid() != os.Getpid() {
		return errors.New("the reaper does not run on the main thread: it would take the exit status of others' processes")
	}
	exits := make(chan os.Signal, 1)
	signal.Notify(exits, unix.SIGCHLD)
	defer signal.Stop(exits)
	defer func() {
		for pid := range r.exited {
			r.forget(pid)
		}
	}()
	timer := time.NewTimer(0) // signals from before Notify are lost: look at once
	defer timer.Stop()
	for {
		select {
		case <-exits:
		case <-timer.C:
		case <-ctx.Done():
			return nil
		}
		next, err := r.reap(time.Now())
		if err != nil {
			return err
		}
		if next > 0 {
			timer.Reset(next)
		}
	}
}

// reap takes what has been left for long enough, and tells when to look again: 0 when there is nothing to look for.
func (r *Reaper) reap(now time.Time) (next time.Duration, err error) {
	for pid, p := range r.exited {
		left := p.since.Add(r.grace).Sub(now)
		options := unix.WNOWAIT
		if left <= 0 {
			options = 0
		}
		// Nobody there: its owner has waited for it.
		there, err := exitedChild(unix.P_PIDFD, p.pidfd, options)
		if err != nil {
			return 0, fmt.Errorf("reap process %d: %w", pid, err)
		}
		if !there || left <= 0 {
			r.forget(pid)
		} else if next == 0 || left < next {
			next = left
		}
	}
	children, err := os.ReadFile("/proc/thread-self/children")
	if err != nil {
		return 0, fmt.Errorf("list the main thread's children: %w", err)
	}
	for _, field := range strings.Fields(string(children)) {
		pid, err := strconv.Atoi(field)
		if err != nil {
			return 0, fmt.Errorf("list the main thread's children: %w", err)
		}
		if _, known := r.exited[pid]; known || len(r.exited) >= maxOrphans {
			continue
		}
		pidfd, err := unix.PidfdOpen(pid, 0)
		if err != nil {
			continue // its owner has just waited for it
		}
		if there, err := exitedChild(unix.P_PIDFD, pidfd, unix.WNOWAIT); err != nil || !there {
			_ = unix.Close(pidfd)
			continue
		}
		r.exited[pid] = exitedProcess{pidfd: pidfd, since: now}
		if next == 0 || r.grace < next {
			next = r.grace
		}
	}
	return next, nil
}

func (r *Reaper) forget(pid int) {
	_ = unix.Close(r.exited[pid].pidfd)
	delete(r.exited, pid)
}

// exitedChild waits without blocking for a child of the calling thread and reports whether it was there and had exited.
func exitedChild(kind, id, options int) (bool, error) {
	for {
		var info sigchldInfo
		err := waitid(kind, id, &info, unix.WEXITED|unix.WNOHANG|unix.WNOTHREAD|options)
		switch {
		case err == nil:
			return info.pid != 0, nil
		case errors.Is(err, unix.EINTR):
		case errors.Is(err, unix.ECHILD):
			return false, nil
		default:
			return false, err
		}
	}
}
