// SPDX-License-Identifier: Apache-2.0

package task

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"strings"

	eventstypes "github.com/containerd/containerd/api/events"
	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	runcoptions "github.com/containerd/containerd/api/types/runc/options"
	tasktypes "github.com/containerd/containerd/api/types/task"
	"github.com/containerd/errdefs"
	"github.com/containerd/typeurl/v2"
	"github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/cloister-project/cloister/internal/version"
	"github.com/cloister-project/cloister/shim/pods"
	vc "github.com/cloister-project/cloister/virtcontainers"
)

// State tells how a process is.
func (s *Service) State(_ context.Context, r *taskapi.StateRequest) (*taskapi.StateResponse, error) {
	p, err := s.process(r.GetID(), r.GetExecID())
	if err != nil {
		return nil, err
	}
	resp := &taskapi.StateResponse{
		ID: p.id(), Bundle: p.t.bundle, Pid: p.t.pid, ExecID: p.execID,
		Stdin: p.stdin, Stdout: p.stdout, Stderr: p.stderr, Terminal: p.terminal,
	}
	if e, ok := p.hasExited(); ok {
		resp.Status, resp.ExitStatus, resp.ExitedAt = tasktypes.Status_STOPPED, e.Status, timestamppb.New(e.At)
		return resp, nil
	}
	switch p.proc.State().Status {
	case vc.ProcessCreated:
		resp.Status = tasktypes.Status_CREATED
	case vc.ProcessPaused:
		resp.Status = tasktypes.Status_PAUSED
	default:
		// A process that has ended counts as running until its output was delivered and its exit published.
		resp.Status = tasktypes.Status_RUNNING
	}
	return resp, nil
}

// Wait returns when a process has exited, its output was delivered and its exit published.
func (s *Service) Wait(ctx context.Context, r *taskapi.WaitRequest) (*taskapi.WaitResponse, error) {
	p, err := s.process(r.GetID(), r.GetExecID())
	if err != nil {
		if resp := s.result(r.GetID(), r.GetExecID()); resp != nil {
			return &taskapi.WaitResponse{ExitStatus: resp.GetExitStatus(), ExitedAt: resp.GetExitedAt()}, nil
		}
		return nil, err
	}
	select {
	case <-p.exited:
	case <-p.gone:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	e, ok := p.hasExited()
	if !ok {
		// An exec that was deleted before it ever ran.
		return nil, notFound(r.GetID(), r.GetExecID())
	}
	return &taskapi.WaitResponse{ExitStatus: e.Status, ExitedAt: timestamppb.New(e.At)}, nil
}

// Kill sends a signal.
func (s *Service) Kill(ctx context.Context, r *taskapi.KillRequest) (*emptypb.Empty, error) {
	p, err := s.process(r.GetID(), r.GetExecID())
	if err != nil {
		return nil, err
	}
	if _, ok := p.hasExited(); ok && !r.GetAll() {
		return nil, fmt.Errorf("process already finished: %w", errdefs.ErrNotFound)
	}
	if err := p.proc.Kill(ctx, r.GetSignal(), r.GetAll()); err != nil {
		return nil, err
	}
	return &emptypb.Empty{}, nil
}

// ResizePty sets a terminal's size; before the start it is kept.
func (s *Service) ResizePty(ctx context.Context, r *taskapi.ResizePtyRequest) (*emptypb.Empty, error) {
	p, err := s.process(r.GetID(), r.GetExecID())
	if err != nil {
		return nil, err
	}
	if err := p.proc.Resize(ctx, r.GetWidth(), r.GetHeight()); err != nil {
		return nil, err
	}
	return &emptypb.Empty{}, nil
}

// CloseIO ends a process's input, behind the bytes that are on their way. It is safe to repeat.
func (s *Service) CloseIO(_ context.Context, r *taskapi.CloseIORequest) (*emptypb.Empty, error) {
	p, err := s.process(r.GetID(), r.GetExecID())
	if err != nil {
		return nil, err
	}
	if r.GetStdin() && p.relay != nil {
		p.relay.CloseStdin()
	}
	return &emptypb.Empty{}, nil
}

// Pause freezes a container.
func (s *Service) Pause(ctx context.Context, r *taskapi.PauseRequest) (*emptypb.Empty, error) {
	t, err := s.task(r.GetID())
	if err != nil {
		return nil, err
	}
	if err := t.container.Pause(ctx); err != nil {
		return nil, err
	}
	s.Events.Publish(&eventstypes.TaskPaused{ContainerID: t.id})
	return &emptypb.Empty{}, nil
}

// Resume lets a container run on.
func (s *Service) Resume(ctx context.Context, r *taskapi.ResumeRequest) (*emptypb.Empty, error) {
	t, err := s.task(r.GetID())
	if err != nil {
		return nil, err
	}
	if err := t.container.Resume(ctx); err != nil {
		return nil, err
	}
	s.Events.Publish(&eventstypes.TaskResumed{ContainerID: t.id})
	return &emptypb.Empty{}, nil
}

// Checkpoint is not there.
func (s *Service) Checkpoint(context.Context, *taskapi.CheckpointTaskRequest) (*emptypb.Empty, error) {
	return nil, fmt.Errorf("checkpoint of a container in a VM: %w", errdefs.ErrNotImplemented)
}

// Update changes a container's limits, or with the pause container's id the pod's.
func (s *Service) Update(ctx context.Context, r *taskapi.UpdateTaskRequest) (*emptypb.Empty, error) {
	t, err := s.task(r.GetID())
	if err != nil {
		return nil, err
	}
	any := r.GetResources()
	if url := any.GetTypeUrl(); !strings.HasSuffix(url, "/LinuxResources") {
		return nil, fmt.Errorf("update of container %s with %q, want LinuxResources of the OCI runtime specification: %w", t.id, url,
			errdefs.ErrInvalidArgument)
	}
	var resources specs.LinuxResources
	if err := json.Unmarshal(any.GetValue(), &resources); err != nil {
		return nil, fmt.Errorf("decode the new resources of container %s: %w: %w", t.id, err, errdefs.ErrInvalidArgument)
	}
	if err := t.container.Update(ctx, &resources); err != nil {
		return nil, err
	}
	return &emptypb.Empty{}, nil
}

// Stats are a container's, or the pod's with the pause container's id. They can be had until Delete.
func (s *Service) Stats(ctx context.Context, r *taskapi.StatsRequest) (*taskapi.StatsResponse, error) {
	t, err := s.task(r.GetID())
	if err != nil {
		return nil, err
	}
	metrics, err := t.container.Stats(ctx)
	if err != nil {
		return nil, err
	}
	packed, err := typeurl.MarshalAnyToProto(metrics)
	if err != nil {
		return nil, err
	}
	return &taskapi.StatsResponse{Stats: packed}, nil
}

// Pids lists a container's processes by the pid that stands for them; see the package comment. A task that has exited
// still has its entry: containerd takes a task without one for a leak when it restarts, and its exit status would be
// lost. The guest is not asked, so that a stuck one does not hold containerd's restart up.
func (s *Service) Pids(_ context.Context, r *taskapi.PidsRequest) (*taskapi.PidsResponse, error) {
	t, err := s.task(r.GetID())
	if err != nil {
		if pid := s.sandboxPID(r.GetID()); pid != 0 {
			return &taskapi.PidsResponse{Processes: []*tasktypes.ProcessInfo{{Pid: pid}}}, nil
		}
		return nil, err
	}
	resp := &taskapi.PidsResponse{Processes: []*tasktypes.ProcessInfo{{Pid: t.pid}}}
	t.mu.Lock()
	defer t.mu.Unlock()
	for id, p := range t.execs {
		if _, exited := p.hasExited(); exited || !p.wasStarted() {
			continue
		}
		info, err := typeurl.MarshalAnyToProto(&runcoptions.ProcessDetails{ExecID: id})
		if err != nil {
			return nil, err
		}
		resp.Processes = append(resp.Processes, &tasktypes.ProcessInfo{Pid: t.pid, Info: info})
	}
	return resp, nil
}

// sandboxPID is the VMM's pid if id is the sandbox's.
func (s *Service) sandboxPID(id string) uint32 {
	if pod, sandbox, _, err := s.Holder.Get(); err == nil && sandbox == id {
		return pod.Info().PID
	}
	return 0
}

// Connect tells who serves. It works for every id, also a sandbox's: containerd asks when it restarts, and takes an
// error for a dead shim.
func (s *Service) Connect(_ context.Context, r *taskapi.ConnectRequest) (*taskapi.ConnectResponse, error) {
	resp := &taskapi.ConnectResponse{ShimPid: uint32(os.Getpid()), Version: version.Version}
	if t, err := s.task(r.GetID()); err == nil {
		resp.TaskPid = t.pid
	} else {
		resp.TaskPid = s.sandboxPID(r.GetID())
	}
	return resp, nil
}

// Shutdown ends the process if nothing is left to serve. containerd calls it after each deletion. A sandbox made by the
// Sandbox service ends it by ShutdownSandbox only.
func (s *Service) Shutdown(ctx context.Context, _ *taskapi.ShutdownRequest) (*emptypb.Empty, error) {
	if s.Holder.Mode() == pods.ModeSandbox {
		return &emptypb.Empty{}, nil
	}
	s.mu.Lock()
	idle := len(s.tasks) == 0
	if !idle && s.allPassing() {
		// containerd gave up on a Create and does not ask again.
		s.quitWhenIdle = true
	}
	s.mu.Unlock()
	if idle {
		s.Config.Shutdown(ctx)
	}
	return &emptypb.Empty{}, nil
}

// allPassing reports whether all tasks are being created or deleted. The caller holds mu.
func (s *Service) allPassing() bool {
	for _, t := range s.tasks {
		if !t.created() {
			continue
		}
		t.mu.Lock()
		deleting := t.del != nil
		t.mu.Unlock()
		if !deleting {
			return false
		}
	}
	return true
}
