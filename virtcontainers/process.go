// SPDX-License-Identifier: Apache-2.0

package virtcontainers

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/cloister-project/cloister/virtcontainers/guest"
)

// drainTime bounds the wait for a process's last output to be delivered to whoever reads it. A reader that has gone
// away must not keep the exit back for ever.
const drainTime = 10 * time.Second

// statusLost is the exit status of a process whose VM was lost: as if by SIGKILL.
const statusLost = 128 + 9

// maxExitStatus bounds what a guest may tell.
const maxExitStatus = 255

// Process is one process of a container: its init, or a further one (exec).
type Process struct {
	container *Container
	execID    string
	io        ProcessIO
	stdio     Stdio

	// done is closed once exit is final and the output has been delivered.
	done chan struct{}

	mu     sync.Mutex
	status ProcessStatus
	exit   Exit
}

func newProcess(c *Container, execID string, stdio Stdio, io ProcessIO) *Process {
	return &Process{container: c, execID: execID, io: io, stdio: stdio, done: make(chan struct{}), status: ProcessCreated}
}

// ID is the exec id, empty for a container's init.
func (p *Process) ID() string { return p.execID }

// State of the process now.
func (p *Process) State() ProcessState {
	p.mu.Lock()
	defer p.mu.Unlock()
	return ProcessState{Status: p.status, PID: p.container.pid(), Exit: p.exit, Stdio: p.stdio}
}

// move changes the state from one to another; errdefs.ErrFailedPrecondition when the process is not in the first, or there
// is no such move.
func (p *Process) move(from, to ProcessStatus) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.status != from {
		return fmt.Errorf("process %s is %s, not %s: %w", p.name(), p.status, from, errdefs.ErrFailedPrecondition)
	}
	return p.moveLocked(to)
}

// moveLocked changes the state. The caller holds mu.
func (p *Process) moveLocked(to ProcessStatus) error {
	if err := checkMove(processMoves, p.status, to); err != nil {
		return fmt.Errorf("process %s: %w", p.name(), err)
	}
	p.status = to
	return nil
}

// ref names the process in its guest.
func (p *Process) ref() guest.Process {
	return guest.Process{Container: p.container.id, Exec: p.execID}
}

func (p *Process) name() string {
	if p.execID == "" {
		return p.container.id
	}
	return p.container.id + "/" + p.execID
}

// Start lets the process run. For an init it returns when the container's poststart hooks have run. A process that cannot
// be started is stopped with the status that a shell would give: 127 for a command that is not there, 126 for one that
// cannot be executed.
func (p *Process) Start(ctx context.Context) error {
	if err := p.move(ProcessCreated, ProcessRunning); err != nil {
		return err
	}
	g := p.container.pod.agent()
	if err := g.Err(); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, p.container.pod.cfg.Config.Timeouts.CreateContainer)
	defer cancel()
	// The agent hears of no cancellation: whether the process runs is known by its answer alone.
	call, done := context.WithTimeout(context.WithoutCancel(ctx), p.container.pod.cfg.Config.Timeouts.CreateContainer)
	defer done()
	if err := g.StartProcess(call, p.ref()); err != nil {
		if p.execID != "" {
			p.finish(Exit{Status: failedStartStatus(err), At: time.Now(), Err: err}, 0, 0)
			return err
		}
		_ = p.move(ProcessRunning, ProcessCreated)
		return err
	}
	if p.execID != "" {
		p.container.pod.goTracked(p.watch)
		return nil
	}
	// The init's wait runs since its creation: it can be killed before it starts.
	p.container.runPoststartHooks(ctx)
	return nil
}

func failedStartStatus(err error) uint32 {
	if errors.Is(err, errdefs.ErrNotFound) {
		return 127
	}
	return 126
}

// watch waits for the process's end in the guest, or the guest's own.
func (p *Process) watch(ctx context.Context) {
	g := p.container.pod.agent()
	if g.Err() != nil {
		p.lost()
		return
	}
	resp, err := g.WaitProcess(ctx, p.ref())
	if err != nil {
		if errdefs.IsUnavailable(err) || ctx.Err() != nil {
			return // the guest is gone, and the pod's end gives the exit
		}
		// The agent lost sight of the process. Somebody waits for its exit, so it is ended for certain.
		err = fmt.Errorf("the guest lost process %s: %w", p.name(), err)
		log.G(ctx).WithError(err).Warn("end it")
		_ = g.SignalProcess(ctx, p.ref(), 9, p.execID == "")
		p.finish(Exit{Status: statusLost, At: time.Now(), Err: err}, 0, 0)
		return
	}
	p.container.noteOOM(resp.GetOomKills())
	if p.execID == "" {
		p.container.saveTermination(ctx, resp.GetTerminationMessage())
	}
	exit := Exit{Status: min(resp.GetExitStatus(), maxExitStatus), At: exitTime(resp.GetExitedAt(), p.container.pod.created)}
	p.finish(exit, resp.GetStdoutBytes(), resp.GetStderrBytes())
}

// exitTime is when a process ended as the guest says, if that can be: its clock may be wrong, or lie.
func exitTime(said *timestamppb.Timestamp, podCreated time.Time) time.Time {
	now := time.Now()
	if at := said.AsTime(); said.IsValid() && at.After(podCreated) && at.Before(now) {
		return at
	}
	return now
}

// lost ends the process because its VM is gone.
func (p *Process) lost() {
	p.finish(Exit{Status: statusLost, At: time.Now(), Err: p.container.pod.lostError()}, 0, 0)
}

// finish makes the exit final, once: later calls change nothing. Output is delivered before anybody learns of the
// exit.
func (p *Process) finish(exit Exit, stdoutBytes, stderrBytes uint64) {
	p.mu.Lock()
	if p.moveLocked(ProcessStopped) != nil {
		p.mu.Unlock()
		return // it has ended
	}
	p.exit = exit
	p.mu.Unlock()

	if p.execID == "" {
		p.container.endStandIn()
	}
	ctx, cancel := context.WithTimeout(context.Background(), drainTime)
	defer cancel()
	p.io.Drain(ctx, stdoutBytes, stderrBytes)
	close(p.done)
}

// started reports whether the process ran at some time.
func (p *Process) started() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.status != ProcessCreated
}

// Wait returns when the process has ended and its output was delivered.
func (p *Process) Wait(ctx context.Context) (Exit, error) {
	select {
	case <-p.done:
		p.mu.Lock()
		defer p.mu.Unlock()
		return p.exit, nil
	case <-ctx.Done():
		return Exit{}, ctx.Err()
	}
}

// Kill sends a signal to the process, or with all to every process of its container.
func (p *Process) Kill(ctx context.Context, signal uint32, all bool) error {
	if p.State().Status == ProcessStopped && !all {
		return fmt.Errorf("process already finished: %w", errdefs.ErrNotFound)
	}
	g := p.container.pod.agent()
	if g.Err() != nil {
		return fmt.Errorf("process already finished: %w", errdefs.ErrNotFound)
	}
	return g.SignalProcess(ctx, p.ref(), signal, all)
}

// Resize sets the terminal's size, kept until the start where that is still to come.
func (p *Process) Resize(ctx context.Context, width, height uint32) error {
	if !p.stdio.Terminal {
		return fmt.Errorf("process %s has no terminal: %w", p.name(), errdefs.ErrFailedPrecondition)
	}
	return p.container.pod.agent().ResizeTerminal(ctx, p.ref(), width, height)
}

// Delete forgets a further process. One that runs gives ErrFailedPrecondition; one that never started can go.
func (p *Process) Delete(ctx context.Context) (Exit, error) {
	if p.execID == "" {
		return Exit{}, fmt.Errorf("delete of an init process: %w", errdefs.ErrInvalidArgument)
	}
	state := p.State()
	switch state.Status {
	case ProcessRunning, ProcessPaused:
		return Exit{}, fmt.Errorf("process %s is %s: %w", p.name(), state.Status, errdefs.ErrFailedPrecondition)
	case ProcessCreated:
		state.Exit = Exit{Status: 0, At: time.Now()}
	}
	if err := p.container.pod.agent().DeleteProcess(ctx, p.ref()); err != nil && !errdefs.IsNotFound(err) && !errdefs.IsUnavailable(err) {
		return Exit{}, err
	}
	p.container.forget(p)
	if err := p.io.Close(); err != nil {
		log.G(ctx).WithError(err).WithField("process", p.name()).Debug("close of stdio")
	}
	return state.Exit, nil
}
