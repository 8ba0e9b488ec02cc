// SPDX-License-Identifier: Apache-2.0

package task

import (
	"context"
	"errors"
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
	vc "github.com/cloister-project/cloister/virtcontainers"
)

const (
	// lastExitTime bounds how long an init's exit is held back for those of other processes. They end with it, and what is
	// left is to deliver their output, for which the agent and the pod give up sooner than this on a reader that takes
	// nothing. A guest that keeps silent about one must not keep the container's exit back for ever.
	lastExitTime = time.Minute
	// statusLost is the exit status of an exec that the guest does not report the end of: as if by SIGKILL.
	statusLost = 128 + 9
)

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
	// awaited ends when an exec is given up, with giveUp: its container has ended and can wait no longer.
	awaited context.Context
	giveUp  context.CancelFunc

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
	p := &process{t: t, execID: execID, exited: make(chan struct{}), gone: make(chan struct{})}
	p.awaited, p.giveUp = context.WithCancel(context.Background())
	return p
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

// endStart closes the gate. Where the process has started the event that says so is queued first, by announce, and behind
// it by flush that of the OOM killer's strike meanwhile; neither blocks. It reports whether the process counts as started:
// an exec that was given up does not.
func (p *process) endStart(started bool, announce, flush func()) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.started = started && p.awaited.Err() == nil
	if p.started {
		announce()
	}
	if p.oomHeld {
		p.oomHeld = false
		flush()
	}
	close(p.starting)
	p.starting = nil
	return p.started
}

// abandon gives an exec up. One that has started is ended by its watcher at once; one whose Start is still under way never
// counts as started. It reports whether there is an exit to wait for.
func (p *process) abandon() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.giveUp()
	return p.started
}

// holdOOM reports whether the OOM event has to wait for the start's.
func (p *process) holdOOM() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.starting != nil {
		p.oomHeld = true
	}
	return p.starting != nil
}

// gate returns the Start under way, if any, and marks the process as ended if wanted.
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

// hasExited returns the final exit.
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
		exit, err := s.awaitEnd(p)
		if err != nil {
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

// awaitEnd waits for the end of a process, or until it is given up. Only the service's own end makes an error.
func (s *Service) awaitEnd(p *process) (vc.Exit, error) {
	ctx, cancel := context.WithCancel(s.life)
	defer cancel()
	defer context.AfterFunc(p.awaited, cancel)()
	exit, err := p.proc.Wait(ctx)
	if err != nil && s.life.Err() == nil {
		return vc.Exit{Status: statusLost, At: time.Now(), Err: errors.New("it has not ended with its container")}, nil
	}
	return exit, err
}

// awaitOthers waits until an init's exit may be published as the last of its container. It is the one place that keeps
// this order. An exec that has not ended in time is given up, and its exit published with a status as if it was killed:
// the order holds whatever the guest does.
func (s *Service) awaitOthers(t *task) {
	ctx, cancel := context.WithTimeout(s.life, s.lastExitTime)
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
		if p.wasStarted() {
			select {
			case <-p.exited:
				continue
			case <-p.gone:
				continue
			case <-ctx.Done():
			}
		}
		// It never ran, or its time is up.
		if p.abandon() {
			log.G(s.life).WithFields(log.Fields{"container": t.id, "exec": p.execID}).Error("an exec outlives its container's init")
			select {
			case <-p.exited:
			case <-p.gone:
			case <-s.life.Done():
			}
		}
	}
	if t.pause {
		s.awaitExits(ctx, t)
	}
}
