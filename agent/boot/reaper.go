// SPDX-License-Identifier: Apache-2.0

package boot

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"sync"

	"golang.org/x/sys/unix"
)

// Reaper waits for processes that PID 1 inherited, and for no others.
//
// A process belongs to the thread that forked it, and orphans go to PID 1's main thread; Run sits on the main thread and
// waits only for that thread's children (__WNOTHREAD). A process can come to the main thread in one more way: if the
// thread that forked it ends, which in Go only happens when a goroutine ends that is locked to its thread. libcontainer
// does so for a process with a CPU affinity of its own (process.execCPUAffinity). Whoever starts such a process calls
// Register as soon as the pid is known; all others need not.
type Reaper struct {
	wake chan struct{}

	mu    sync.Mutex
	owned map[int]int // pid → registrations
}

func newReaper() *Reaper {
	return &Reaper{wake: make(chan struct{}, 1), owned: map[int]int{}}
}

// Register keeps Run away from a process that the caller waits for by itself. The caller calls release after it has
// waited; calling it again does nothing.
func (r *Reaper) Register(pid int) (release func()) {
	r.mu.Lock()
	r.owned[pid]++
	r.mu.Unlock()
	return sync.OnceFunc(func() {
		r.mu.Lock()
		if r.owned[pid]--; r.owned[pid] <= 0 {
			delete(r.owned, pid)
		}
		r.mu.Unlock()
		// A registered process may have stood before others in the queue.
		select {
		case r.wake <- struct{}{}:
		default:
		}
	})
}

// Run reaps until ctx ends. It must be called from a goroutine that is locked to the process's main thread
// (runtime.LockOSThread in an init function) and that starts no process.
func (r *Reaper) Run(ctx context.Context) error {
	if unix.Gettid() != os.Getpid() {
		return errors.New("the reaper does not run on the main thread: it would take the exit status of others' processes")
	}
	exits := make(chan os.Signal, 1)
	signal.Notify(exits, unix.SIGCHLD)
	defer signal.Stop(exits)
	for {
		// Before the first wait too: signals from before Notify are lost.
		if err := r.reap(); err != nil {
			return err
		}
		select {
		case <-exits:
		case <-r.wake:
		case <-ctx.Done():
			return nil
		}
	}
}

// reap takes every orphan that has exited, up to the first registered one.
func (r *Reaper) reap() error {
	for {
		pid, err := waitMainThread(unix.P_ALL, 0, unix.WNOWAIT)
		if err != nil {
			return fmt.Errorf("look for orphans that have exited: %w", err)
		}
		if pid == 0 {
			return nil
		}
		r.mu.Lock()
		owned := r.owned[pid] > 0
		r.mu.Unlock()
		if owned {
			return nil
		}
		if _, err := waitMainThread(unix.P_PID, pid, 0); err != nil {
			return fmt.Errorf("reap orphan %d: %w", pid, err)
		}
	}
}

// waitMainThread waits for an exited child of the calling thread without blocking and gives its pid, 0 if there is none.
func waitMainThread(kind, id, options int) (int, error) {
	for {
		var info sigchldInfo
		err := waitid(kind, id, &info, unix.WEXITED|unix.WNOHANG|unix.WNOTHREAD|options)
		switch {
		case err == nil:
			return int(info.pid), nil
		case errors.Is(err, unix.EINTR):
		case errors.Is(err, unix.ECHILD):
			return 0, nil
		default:
			return 0, err
		}
	}
}
