// SPDX-License-Identifier: Apache-2.0

package container

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/opencontainers/runc/libcontainer"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/timestamppb"

	agentv1 "github.com/cloister-project/cloister/agent-protocol/v1"
	"github.com/cloister-project/cloister/agent/ocispec"
)

// failedStart is the exit status of a process that could not be started.
const failedStart = 255

type processState int

const (
	processCreated processState = iota
	processStarting
	processRunning
	processExited
)

// process is a container's init or a further process of it. Its mutable fields are guarded by the container's mu.
type process struct {
	id string // empty for the init
	c  *container
	lp *libcontainer.Process
	io *processIO

	state  processState
	reaped bool // the kernel's process is gone, though its exit may not be reported yet
	pid    int

	// exit is valid once done is closed.
	exit struct {
		status         uint32
		at             time.Time
		stdout, stderr uint64
		oomKills       uint64
		message        []byte
	}
	done chan struct{}
	// gone is closed when the kernel's process has been reaped.
	gone chan struct{}
}

func newProcess(c *container, id string, spec *specs.Process, stdio stdioSpec) *process {
	return &process{id: id, c: c, lp: ocispec.LibcontainerProcess(spec), io: newProcessIO(stdio), done: make(chan struct{}),
		gone: make(chan struct{})}
}

func (p *process) String() string {
	if p.id == "" {
		return fmt.Sprintf("container %q", p.c.id)
	}
	return fmt.Sprintf("process %q of container %q", p.id, p.c.id)
}

// start runs a further process.
func (p *process) start() error {
	c := p.c
	c.mu.Lock()
	switch {
	case c.state != stateRunning && c.state != stateCreated:
		defer c.mu.Unlock()
		return c.wrongState("exec in", c.state)
	case p.state != processCreated:
		defer c.mu.Unlock()
		return fmt.Errorf("it has been started before: %w", errdefs.ErrFailedPrecondition)
	}
	conns, err := c.m.cfg.Streams.take(p.io.spec.ids())
	if err != nil {
		c.mu.Unlock()
		return err
	}
	p.state = processStarting // and never back: whoever waits for processes that were started waits for its exit
	c.mu.Unlock()

	if err := p.run(); err != nil {
		for _, conn := range conns {
			_ = conn.Close()
		}
		p.io.close()
		p.finish(failedStart)
		return err
	}
	p.io.attach(conns)
	c.mu.Lock()
	p.state = processRunning
	late := c.state == stateStopped
	c.mu.Unlock()
	if late {
		// The init has died meanwhile, and this process may have come into the cgroup after all in it were killed.
		c.killRest()
	}
	go p.waitExit()
	return nil
}

// release lets a container's init, which waits for a reader of its fifo, go on. It is libcontainer's Container.Exec, which
// leaves a goroutine, a thread and a descriptor behind for each init that was killed before.
func (p *process) release(ctx context.Context, fifo string) error {
	// Without waiting: a dead init never opens its end.
	f, err := os.OpenFile(fifo, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return fmt.Errorf("exec fifo: %w", err)
	}
	defer f.Close()
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	finished := make(chan struct{})
	var watcher sync.WaitGroup
	watcher.Go(func() {
		select {
		case <-p.gone:
		case <-ctx.Done():
		case <-finished:
			return
		}
		_ = f.SetReadDeadline(time.Unix(1, 0)) // wakes up the read
	})
	var buf [1]byte
	n := 0
	// The init writes one byte. Reads of none mean that it has not opened the fifo yet.
	err = raw.Read(func(fd uintptr) bool {
		n, _ = unix.Read(int(fd), buf[:])
		return n > 0
	})
	close(finished)
	watcher.Wait()
	if n <= 0 && errors.Is(err, os.ErrDeadlineExceeded) && f.SetReadDeadline(time.Time{}) == nil {
		// It may have written, run and ended before this goroutine looked.
		_ = raw.Read(func(fd uintptr) bool {
			n, _ = unix.Read(int(fd), buf[:])
			return true
		})
	}
	switch {
	case n > 0:
		// libcontainer knows by its absence that the container runs.
		return os.Remove(fifo)
	case ctx.Err() != nil:
		return ctx.Err()
	case errors.Is(err, os.ErrDeadlineExceeded):
		return errors.New("container process is already dead")
	}
	return fmt.Errorf("exec fifo: %w", err)
}

// run makes the kernel's process, with the stdio of libcontainer's making attached to p.io.
func (p *process) run() error {
	config := p.c.lc.Config()
	owner, _ := config.HostRootUID() // both were checked when the container was made
	group, _ := config.HostRootGID()
	if err := p.io.open(p.lp, owner, group); err != nil {
		return err
	}
	if err := p.c.lc.Run(p.lp); err != nil {
		return withKind(err, errdefs.ErrInternal)
	}
	p.pid, _ = p.lp.Pid()
	if err := p.io.childStarted(); err != nil {
		_ = p.lp.Signal(unix.SIGKILL)
		_, _ = p.lp.Wait()
		return err
	}
	return nil
}

// waitExit reaps the process and records its exit. It runs once for each process that the kernel has made.
func (p *process) waitExit() {
	c := p.c
	state, err := p.lp.Wait()
	at := time.Now()
	status := exitStatus(state)
	if state == nil {
		log.L.WithError(err).WithField("container", c.id).WithField("exec", p.id).Error("the exit status of a process is lost")
	}
	c.mu.Lock()
	p.reaped = true
	close(p.gone)
	if p == c.init && c.state != stateCreating { // else create looks at reaped when it is done
		c.state = stateStopped
	}
	c.mu.Unlock()
	if p == c.init {
		c.killRest()
	}
	stdout, stderr := p.io.exited()
	var message []byte
	if p == c.init {
		if message, err = c.m.cfg.Storage.TerminationMessage(c.id); err != nil {
			log.L.WithError(err).WithField("container", c.id).Warn("what the container says of its end is not known")
		}
	}
	c.mu.Lock()
	p.exit.at, p.exit.stdout, p.exit.stderr, p.exit.message = at, stdout, stderr, message
	c.mu.Unlock()
	p.finish(status)
}

// killRest ends what an init has left. With a pid namespace of its own the kernel has done it; in one that is shared, the
// container's cgroup tells who belongs to it.
func (c *container) killRest() {
	if c.ownPID {
		return
	}
	if err := killCgroup(c.dir); errors.Is(err, os.ErrNotExist) {
		_ = c.lc.Signal(unix.SIGKILL)
	}
}

// finish makes the exit known.
func (p *process) finish(status uint32) {
	kills := p.c.oomTotal()
	p.c.mu.Lock()
	defer p.c.mu.Unlock()
	if p.state == processExited {
		return
	}
	p.state, p.reaped = processExited, true
	p.exit.status, p.exit.oomKills = status, kills
	if p.exit.at.IsZero() {
		p.exit.at = time.Now()
	}
	close(p.done)
}

// exitStatus is the status as a shell gives it.
func exitStatus(state *os.ProcessState) uint32 {
	if state == nil {
		return failedStart
	}
	ws, ok := state.Sys().(syscall.WaitStatus)
	switch {
	case !ok:
		return failedStart
	case ws.Signaled():
		return 128 + uint32(ws.Signal())
	}
	return uint32(ws.ExitStatus())
}

// exitResponse must be called after done is closed.
func (p *process) exitResponse() *agentv1.WaitProcessResponse {
	return &agentv1.WaitProcessResponse{
		ExitStatus:  p.exit.status,
		ExitedAt:    timestamppb.New(p.exit.at),
		StdoutBytes: p.exit.stdout,
		StderrBytes: p.exit.stderr,
		OomKills:    p.exit.oomKills,

		TerminationMessage: p.exit.message,
	}
}

// signal sends a signal to this process.
func (p *process) signal(signal uint32) error {
	p.c.mu.Lock()
	state, reaped := p.state, p.reaped
	p.c.mu.Unlock()
	switch {
	case reaped:
		return errProcessFinished()
	case state == processCreated || state == processStarting && p != p.c.init:
		return fmt.Errorf("%s is not started: %w", p, errdefs.ErrFailedPrecondition)
	}
	if p == p.c.init && unix.Signal(signal) == unix.SIGKILL && !p.c.ownPID {
		// The init of a container in a shared pid namespace has no power over its children there.
		return p.c.signalAll(signal)
	}
	// By pidfd (os.Process), so that a pid that was used again is never hit.
	err := p.lp.Signal(unix.Signal(signal))
	if errors.Is(err, os.ErrProcessDone) || errors.Is(err, unix.ESRCH) {
		return errProcessFinished()
	}
	if err != nil {
		return fmt.Errorf("signal %s: %w", p, err)
	}
	return nil
}

// delete forgets an exited or never started further process.
func (p *process) delete() error {
	c := p.c
	c.mu.Lock()
	if p.state == processStarting || p.state == processRunning {
		c.mu.Unlock()
		return fmt.Errorf("cannot delete %s: it is running: %w", p, errdefs.ErrFailedPrecondition)
	}
	if c.execs[p.id] != p {
		c.mu.Unlock()
		return fmt.Errorf("%s: %w", p, errdefs.ErrNotFound)
	}
	delete(c.execs, p.id)
	c.mu.Unlock()
	p.free()
	return nil
}

// free closes what an ended process still holds, and ends one that never started.
func (p *process) free() {
	p.finish(failedStart)
	p.io.close()
	p.c.m.cfg.Streams.forget(p.io.spec.ids())
}
