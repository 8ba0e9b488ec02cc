// SPDX-License-Identifier: Apache-2.0

package task

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	eventstypes "github.com/containerd/containerd/api/events"
	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/cloister-project/cloister/shim/bundle"
	"github.com/cloister-project/cloister/shim/pods"
	"github.com/cloister-project/cloister/shim/stdio"
	vc "github.com/cloister-project/cloister/virtcontainers"
)

// Start lets a process run.
func (s *Service) Start(ctx context.Context, r *taskapi.StartRequest) (*taskapi.StartResponse, error) {
	p, err := s.process(r.GetID(), r.GetExecID())
	if err != nil {
		return nil, err
	}
	if err := p.beginStartIn(); err != nil {
		return nil, err
	}
	announce := func() {
		if p.isInit() {
			s.Events.Publish(&eventstypes.TaskStart{ContainerID: p.t.id, Pid: p.t.pid})
		} else {
			s.Events.Publish(&eventstypes.TaskExecStarted{ContainerID: p.t.id, ExecID: p.execID, Pid: p.t.pid})
		}
	}
	oom := func() { s.Events.Publish(&eventstypes.TaskOOM{ContainerID: p.t.id}) }
	if p.relay != nil { // a pause container has none
		if err := p.relay.OpenStdin(); err != nil {
			p.endStart(false, announce, oom)
			return nil, err
		}
	}
	if err := p.proc.Start(ctx); err != nil {
		p.endStart(false, announce, oom)
		if state := p.proc.State(); !p.isInit() && state.Status == vc.ProcessStopped {
			// It never ran: there is no event, but whoever waits for it learns its end.
			p.setExit(bundle.Exit{PID: p.t.pid, Status: state.Exit.Status, At: state.Exit.At})
		}
		return nil, err
	}
	if !p.endStart(true, announce, oom) {
		// The container's exit was published meanwhile, and it is the last.
		p.setExit(bundle.Exit{PID: p.t.pid, Status: statusLost, At: time.Now()})
		return nil, fmt.Errorf("container %s is not running: %w", p.t.id, errdefs.ErrFailedPrecondition)
	}
	if !p.isInit() {
		s.watch(p) // an init is watched since its creation
	}
	return &taskapi.StartResponse{Pid: p.t.pid}, nil
}

// beginStartIn is beginStart; no exec starts in a container whose init has exited.
func (p *process) beginStartIn() error {
	if p.isInit() {
		return p.beginStart()
	}
	p.t.mu.Lock()
	defer p.t.mu.Unlock()
	if p.t.ending {
		return fmt.Errorf("container %s is not running: %w", p.t.id, errdefs.ErrFailedPrecondition)
	}
	return p.beginStart()
}

// Exec makes a further process in a container, to be started with Start.
func (s *Service) Exec(ctx context.Context, r *taskapi.ExecProcessRequest) (*emptypb.Empty, error) {
	t, err := s.task(r.GetID())
	if err != nil {
		return nil, err
	}
	if r.GetExecID() == "" {
		return nil, fmt.Errorf("exec in container %s needs an id: %w", t.id, errdefs.ErrInvalidArgument)
	}
	var spec specs.Process
	if err := json.Unmarshal(r.GetSpec().GetValue(), &spec); err != nil {
		return nil, fmt.Errorf("decode the process of exec %s in container %s: %w: %w", r.GetExecID(), t.id, err, errdefs.ErrInvalidArgument)
	}
	spec.Terminal = r.GetTerminal()

	p := newProcess(t, r.GetExecID())
	p.stdin, p.stdout, p.stderr, p.terminal = r.GetStdin(), r.GetStdout(), r.GetStderr(), r.GetTerminal()
	if err := t.reserveExec(p); err != nil {
		return nil, err
	}
	proc, err := s.exec(ctx, t, p, &spec)
	if err != nil {
		t.mu.Lock()
		delete(t.execs, p.execID)
		t.mu.Unlock()
		return nil, err
	}
	s.mu.Lock()
	s.deleted.forget(t.id, p.execID)
	s.mu.Unlock()
	// Queued before the process can be found and started.
	s.Events.Publish(&eventstypes.TaskExecAdded{ContainerID: t.id, ExecID: p.execID})
	t.mu.Lock()
	p.proc = proc
	t.mu.Unlock()
	return &emptypb.Empty{}, nil
}

func (t *task) reserveExec(p *process) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	switch {
	case t.ending:
		return fmt.Errorf("container %s is not running: %w", t.id, errdefs.ErrFailedPrecondition)
	case t.execs[p.execID] != nil:
		return fmt.Errorf("exec %s in container %s: %w", p.execID, t.id, errdefs.ErrAlreadyExists)
	}
	t.execs[p.execID] = p
	return nil
}

func (s *Service) exec(ctx context.Context, t *task, p *process, spec *specs.Process) (_ pods.Process, err error) {
	p.relay, err = stdio.Open(ctx, stdio.Config{
		Namespace: s.Namespace, ID: t.id, Stdin: p.stdin, Stdout: p.stdout, Stderr: p.stderr, Terminal: p.terminal,
	})
	if err != nil {
		return nil, fmt.Errorf("exec %s in container %s: %w", p.execID, t.id, err)
	}
	proc, err := t.container.Exec(ctx, vc.ExecConfig{ID: p.execID, Process: spec, Stdio: p.wanted(spec.ConsoleSize), IO: p.relay})
	if err != nil {
		_ = p.relay.Close()
		return nil, err
	}
	return proc, nil
}
