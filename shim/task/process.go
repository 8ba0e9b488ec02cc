// SPDX-License-Identifier: Apache-2.0

package task

import (
	"context"
	"fmt"
	"sync"
	"time"

	eventstypes "github.com/containerd/containerd/api/events"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/cloister-project/cloister/shim/bundle"
	"github.com/cloister-project/cloister/shim/pods"
	"github.com/cloister-project/cloister/shim/stdio"
)

// lastExitTime bounds how long an init's exit is held back for those of other processes. They have all ended by then;
// it is there so that an exit is reported whatever goes wrong.
const lastExitTime = 10 * time.Second

// process is an init (execID is empty) or an exec.
type process struct {
	t      *task
	execID string
	// proc is nil while an exec is being made.
	proc                  pods.Process
	relay                 *stdio.Relay
	stdin, stdout, stderr string
	terminal              bool

	// exited is closed when exit is final and published.
	exited chan struct{}
	// gone is closed when the process was deleted.
	gone chan struct{}

	mu sync.Mutex
	// starting is closed when the Start under way has ended and its event was queued; nil if there is none.
	starting chan struct{}
	started  bool
	// ended: the exit was seen, though perhaps not yet published.
	ended   bool
	oomHeld bool
	exit    bundle.Exit
}

func newProcess(t *task, execID string) *process {
	return &process{t: t, execID: execID, exited: make(chan struct{}), gone: make(chan struct{})}
}

func (p *process) isInit() bool { return p.execID == "" }

// id as events have it.
func (p *process) id() string {
	if p.isInit() {
		return p.t.id
	}
	return p.execID
}

// beginStart opens the gate that holds the exit back.
func (p *process) beginStart() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case p.ended:
		return fmt.Errorf("process %s has exited already: %w", p.id(), errdefs.ErrFailedPrecondition)
	case p.started || p.starting != nil:
		return fmt.Errorf("process %s was started already: %w", p.id(), errdefs.ErrFailedPrecondition)
	}
	p.starting = make(chan struct{})
	return nil
}

// endStart closes the gate. The start's event was queued before, if there is one. It tells whether the OOM killer
// struck meanwhile.
func (p *process) endStart(started bool, flush func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.started = started
	if p.oomHeld {
		p.oomHeld = false
		flush()
	}
	close(p.starting)
	p.starting = nil
}

// holdOOM tells whether the OOM event has to wait for the start's.
func (p *process) holdOOM() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.starting != nil {
		p.oomHeld = true
	}
	return p.starting != nil
}

// gate gives the Start under way, if any, and marks the process as ended if wanted.
func (p *process) gate(ended bool) (starting chan struct{}) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.ended = p.ended || ended
	return p.starting
}

func (p *process) wasStarted() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.started
}

// setExit makes the exit final, once.
func (p *process) setExit(e bundle.Exit) {
	p.mu.Lock()
	defer p.mu.Unlock()
	select {
	case <-p.exited:
		return
	default:
	}
	p.ended = true
	p.exit = e
	close(p.exited)
}

// hasExited gives the final exit.
func (p *process) hasExited() (bundle.Exit, bool) {
	select {
	case <-p.exited:
		p.mu.Lock()
		defer p.mu.Unlock()
		return p.exit, true
	default:
		return bundle.Exit{}, false
	}
}

// watch waits for the end of a process and publishes it. It runs in a goroutine of its own.
func (s *Service) watch(p *process) {
	s.running.Go(func() {
		exit, err := p.proc.Wait(s.life)
		if err != nil {
			// Only the service's own end gives an error.
			return
		}
		if starting := p.gate(true); starting != nil {
			<-starting
		}
		if p.isInit() {
			s.awaitOthers(p.t)
		}
		e := bundle.Exit{PID: p.t.pid, Status: exit.Status, At: exit.At}
		if exit.Err != nil {
			log.G(s.life).WithError(exit.Err).WithFields(log.Fields{"container": p.t.id, "exec": p.execID}).Error("process lost")
		}
		if p.isInit() {
			if err := bundle.WriteExit(p.t.bundle, e); err != nil {
				log.G(s.life).WithError(err).WithField("container", p.t.id).Warn("the exit status is not kept for `delete`")
			}
		}
		s.Events.Publish(&eventstypes.TaskExit{
			ContainerID: p.t.id, ID: p.id(), Pid: e.PID, ExitStatus: e.Status, ExitedAt: timestamppb.New(e.At),
		})
		p.setExit(e)
	})
}

// awaitOthers waits until an init's exit may be published as the last of its container.
func (s *Service) awaitOthers(t *task) {
	ctx, cancel := context.WithTimeout(s.life, lastExitTime)
	defer cancel()
	t.mu.Lock()
	t.ending = true
	execs := make([]*process, 0, len(t.execs))
	for _, p := range t.execs {
		execs = append(execs, p)
	}
	t.mu.Unlock()
	for _, p := range execs {
		if starting := p.gate(false); starting != nil {
			select {
			case <-starting:
			case <-ctx.Done():
			}
		}
		if !p.wasStarted() {
			continue
		}
		select {
		case <-p.exited:
		case <-p.gone:
		case <-ctx.Done():
			log.G(s.life).WithFields(log.Fields{"container": t.id, "exec": p.execID}).Error("an exec outlives its container's init")
		}
	}
	if t.pause {
		s.awaitExits(ctx, t)
	}
}
