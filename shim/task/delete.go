// SPDX-License-Identifier: Apache-2.0

package task

import (
	"context"
	"fmt"
	"slices"
	"time"

	eventstypes "github.com/containerd/containerd/api/events"
	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/cloister-project/cloister/shim/bundle"
	vc "github.com/cloister-project/cloister/virtcontainers"
)

const (
	// deleteTime bounds a deletion whose callers have all left.
	deleteTime = 2 * time.Minute
	// maxResults is how many deletions are remembered.
	maxResults = 128
)

// deletion is a Delete of a task under way.
type deletion struct {
	done chan struct{}
	resp *taskapi.DeleteResponse
	err  error
}

// results remembers the last deletions for callers that did not get their answer (containerd#11392). The caller holds
// Service.mu.
type results struct {
	byKey map[string]*taskapi.DeleteResponse
	order []string
}

func resultKey(id, execID string) string { return id + "/" + execID }

func (r *results) add(id, execID string, resp *taskapi.DeleteResponse) {
	if r.byKey == nil {
		r.byKey = map[string]*taskapi.DeleteResponse{}
	}
	key := resultKey(id, execID)
	if _, ok := r.byKey[key]; !ok {
		r.order = append(r.order, key)
	}
	r.byKey[key] = resp
	if len(r.order) > maxResults {
		delete(r.byKey, r.order[0])
		r.order = r.order[1:]
	}
}

// forget a result: its id is used anew.
func (r *results) forget(id, execID string) {
	key := resultKey(id, execID)
	if _, ok := r.byKey[key]; ok {
		delete(r.byKey, key)
		r.order = slices.DeleteFunc(r.order, func(k string) bool { return k == key })
	}
}

func (s *Service) result(id, execID string) *taskapi.DeleteResponse {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.deleted.byKey[resultKey(id, execID)]
}

// Delete removes a task that has exited, or was never started, or an exec.
func (s *Service) Delete(ctx context.Context, r *taskapi.DeleteRequest) (*taskapi.DeleteResponse, error) {
	s.mu.Lock()
	t := s.tasks[r.GetID()]
	s.mu.Unlock()
	if t != nil {
		// A Create under way ends first, with its undoing.
		select {
		case <-t.made:
		case <-ctx.Done():
			return nil, fmt.Errorf("delete container %s, which is being created: %w", t.id, ctx.Err())
		}
	}
	var resp *taskapi.DeleteResponse
	var err error
	if r.GetExecID() != "" {
		resp, err = s.deleteExec(ctx, r.GetID(), r.GetExecID())
	} else {
		resp, err = s.deleteTask(ctx, r.GetID())
	}
	return resp, err
}

func (s *Service) deleteTask(ctx context.Context, id string) (*taskapi.DeleteResponse, error) {
	t, err := s.task(id)
	if err != nil {
		if resp := s.result(id, ""); resp != nil {
			return resp, nil
		}
		return nil, err
	}
	t.mu.Lock()
	d := t.del
	if d == nil {
		d = &deletion{done: make(chan struct{})}
		t.del = d
		s.running.Go(func() { s.runDeletion(t, d) })
	}
	t.mu.Unlock()
	select {
	case <-d.done:
		return d.resp, d.err
	case <-ctx.Done():
		return nil, fmt.Errorf("delete container %s: it goes on: %w", id, ctx.Err())
	}
}

// runDeletion does the work of one or more Delete requests.
func (s *Service) runDeletion(t *task, d *deletion) {
	ctx, cancel := context.WithTimeout(s.life, deleteTime)
	defer cancel()
	defer close(d.done)
	fail := func(err error) {
		d.err = err
		t.mu.Lock()
		t.del = nil // the next request tries anew
		t.mu.Unlock()
	}
	if _, err := t.container.Delete(ctx); err != nil {
		fail(err)
		return
	}
	// The exit's event comes before the deletion's.
	select {
	case <-t.init.exited:
	case <-ctx.Done():
		fail(fmt.Errorf("container %s was removed, but its exit is not known: %w", t.id, ctx.Err()))
		return
	}
	e, _ := t.init.hasExited()
	d.resp = deleteResponse(e)
	t.mu.Lock()
	for _, p := range t.execs {
		p.forget()
	}
	t.mu.Unlock()
	t.init.forget()
	if t.pause {
		// The pod has ended and left nothing, but the process may go on for containers that are still to be deleted.
		// `delete` on this bundle must not end it.
		if err := bundle.ForgetShim(t.bundle); err != nil {
			log.G(ctx).WithError(err).Warn("forget the shim of a bundle")
		}
	}
	s.Events.Publish(&eventstypes.TaskDelete{
		ContainerID: t.id, Pid: e.PID, ExitStatus: e.Status, ExitedAt: timestamppb.New(e.At),
	})
	s.remove(t, d.resp)
}

func deleteResponse(e bundle.Exit) *taskapi.DeleteResponse {
	return &taskapi.DeleteResponse{Pid: e.PID, ExitStatus: e.Status, ExitedAt: timestamppb.New(e.At)}
}

// forget releases a deleted process's stdio and those who wait for it.
func (p *process) forget() {
	p.mu.Lock()
	defer p.mu.Unlock()
	select {
	case <-p.gone:
		return
	default:
	}
	close(p.gone)
	if p.relay != nil {
		_ = p.relay.Close()
	}
}

func (s *Service) deleteExec(ctx context.Context, id, execID string) (*taskapi.DeleteResponse, error) {
	p, err := s.process(id, execID)
	if err != nil {
		if resp := s.result(id, execID); resp != nil {
			return resp, nil
		}
		return nil, err
	}
	if p.wasStarted() && p.proc.State().Status == vc.ProcessStopped {
		// Its last output may still be on its way, and its exit's event is to come first.
		select {
		case <-p.exited:
		case <-ctx.Done():
			return nil, fmt.Errorf("delete process %s of container %s: %w", execID, id, ctx.Err())
		}
	}
	exit, err := p.proc.Delete(ctx)
	e, ok := p.hasExited()
	if err != nil && !(ok && p.awaited.Err() != nil && errdefs.IsFailedPrecondition(err)) {
		// An exec that was given up has exited for containerd, whatever the guest says; it goes with its container.
		return nil, err
	}
	if !ok {
		e = bundle.Exit{PID: p.t.pid, Status: exit.Status, At: exit.At}
	}
	p.t.mu.Lock()
	if p.t.execs[execID] == p {
		delete(p.t.execs, execID)
	}
	p.t.mu.Unlock()
	p.forget()
	resp := deleteResponse(e)
	s.mu.Lock()
	s.deleted.add(id, execID, resp)
	s.mu.Unlock()
	return resp, nil
}
