// SPDX-License-Identifier: Apache-2.0

package task

import (
	"context"
	"fmt"
	"path/filepath"
	"time"

	eventstypes "github.com/containerd/containerd/api/events"
	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/cloister-project/cloister/shim/bundle"
	"github.com/cloister-project/cloister/shim/pods"
	"github.com/cloister-project/cloister/shim/stdio"
	vc "github.com/cloister-project/cloister/virtcontainers"
)

// undoTime bounds the undoing of a Create that failed.
const undoTime = time.Minute

// Create makes a container, and its pod where that comes with it.
func (s *Service) Create(ctx context.Context, r *taskapi.CreateTaskRequest) (*taskapi.CreateTaskResponse, error) {
	ctx = log.WithLogger(ctx, log.G(ctx).WithField("container", r.GetID()))
	switch {
	case r.GetID() == "" || !filepath.IsAbs(r.GetBundle()):
		return nil, fmt.Errorf("create needs an id and the absolute path of a bundle, got %q and %q: %w", r.GetID(), r.GetBundle(),
			errdefs.ErrInvalidArgument)
	case r.GetCheckpoint() != "" || r.GetParentCheckpoint() != "":
		return nil, fmt.Errorf("restore from a checkpoint: a VM's containers have none: %w", errdefs.ErrNotImplemented)
	}
	t, err := s.reserve(r)
	if err != nil {
		return nil, err
	}
	p, err := s.create(ctx, t, r)
	if err == nil && ctx.Err() != nil {
		// The caller has left and takes the task for one that was never made.
		undo(ctx, p.t.container)
		err = fmt.Errorf("create container %s: %w", t.id, ctx.Err())
	}
	if err != nil {
		close(t.made)
		s.remove(t, nil)
		return nil, err
	}
	s.mu.Lock()
	s.quitWhenIdle = false
	s.mu.Unlock()
	t.init = p
	s.Events.Publish(&eventstypes.TaskCreate{
		ContainerID: t.id,
		Bundle:      t.bundle,
		Rootfs:      r.GetRootfs(),
		IO: &eventstypes.TaskIO{
			Stdin: r.GetStdin(), Stdout: r.GetStdout(), Stderr: r.GetStderr(), Terminal: r.GetTerminal(),
		},
		Pid: t.pid,
	})
	close(t.made)
	s.watch(p)
	return &taskapi.CreateTaskResponse{Pid: t.pid}, nil
}

// undo takes back a container that nobody wants any more, and its pod.
func undo(ctx context.Context, c pods.Container) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoTime)
	defer cancel()
	if _, err := c.Delete(ctx); err != nil {
		log.G(ctx).WithError(err).Error("a container that was not created in time cannot be removed")
	}
}

// create makes the container; on an error nothing is left.
func (s *Service) create(ctx context.Context, t *task, r *taskapi.CreateTaskRequest) (*process, error) {
	spec, err := bundle.Spec(t.bundle)
	if err != nil {
		return nil, fmt.Errorf("read the specification of container %s: %w", t.id, err)
	}
	mode, err := s.modeOf(t.id, spec)
	if err != nil {
		return nil, err
	}
	p := newProcess(t, "")
	p.stdin, p.stdout, p.stderr, p.terminal = r.GetStdin(), r.GetStdout(), r.GetStderr(), r.GetTerminal()
	if mode == pods.ModePause {
		t.pause = true
		pod, err := s.makePod(ctx, t, r, mode, spec)
		if err != nil {
			return nil, err
		}
		t.container = newPauseContainer(pod, s.Holder)
	} else if err := s.createContainer(ctx, t, p, r, mode, spec); err != nil {
		return nil, err
	}
	p.proc = t.container.Init()
	t.pid = p.proc.State().PID
	return p, nil
}

// modeOf tells how a container's pod comes about; ModeNone for one that goes into the pod that is there.
func (s *Service) modeOf(id string, spec *specs.Spec) (pods.Mode, error) {
	_, sandbox, mode, _ := s.Holder.Get()
	kind, cri := spec.Annotations[pods.AnnotationContainerType]
	switch {
	case kind == pods.ContainerTypeSandbox:
		return pods.ModePause, nil // a second one is refused by the holder
	case cri && kind != pods.ContainerTypeContainer:
		return 0, fmt.Errorf("annotation %s of container %s is %q, want %q or %q: %w", pods.AnnotationContainerType, id, kind,
			pods.ContainerTypeSandbox, pods.ContainerTypeContainer, errdefs.ErrInvalidArgument)
	case !cri && mode == pods.ModeNone:
		return pods.ModeSingle, nil
	case mode == pods.ModeSingle:
		return 0, fmt.Errorf("container %s: this shim's VM was made for container %s alone; use CRI or the sandbox API to have several "+
			"containers in one VM: %w",
			id, sandbox, errdefs.ErrFailedPrecondition)
	case mode == pods.ModeNone:
		return 0, fmt.Errorf("container %s: its sandbox %s is not in this shim: %w", id, spec.Annotations[pods.AnnotationSandboxID],
			errdefs.ErrFailedPrecondition)
	}
	if want := spec.Annotations[pods.AnnotationSandboxID]; want != "" && want != sandbox {
		return 0, fmt.Errorf("container %s belongs to sandbox %s, this shim has %s: %w", id, want, sandbox, errdefs.ErrInvalidArgument)
	}
	return pods.ModeNone, nil
}

// makePod boots a pod for a task.
func (s *Service) makePod(ctx context.Context, t *task, r *taskapi.CreateTaskRequest, mode pods.Mode, spec *specs.Spec) (_ pods.Pod,
	err error) {
	if err := s.Holder.Claim(mode, t.id); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			s.Holder.Release()
		}
	}()
	options, err := pods.Options(ctx, r.GetOptions(), s.Options)
	if err != nil {
		return nil, err
	}
	cfg, err := pods.FromSpec(ctx, pods.Request{
		ID: t.id, Namespace: s.Namespace, Bundle: t.bundle, Rootfs: r.GetRootfs(), Options: options, OnOOM: s.OnOOM,
	}, mode, spec)
	if err != nil {
		return nil, err
	}
	pod, err := s.NewPod(ctx, cfg)
	if err != nil {
		return nil, err
	}
	// A Start that fails undoes itself.
	if err := pod.Start(ctx); err != nil {
		return nil, err
	}
	s.Holder.Set(pod)
	return pod, nil
}

// createContainer makes a container in the guest, with its own pod in ModeSingle.
func (s *Service) createContainer(ctx context.Context, t *task, p *process, r *taskapi.CreateTaskRequest, mode pods.Mode,
	spec *specs.Spec) (err error) {
	p.relay, err = stdio.Open(ctx, stdio.Config{
		Namespace: s.Namespace, ID: t.id, Stdin: p.stdin, Stdout: p.stdout, Stderr: p.stderr, Terminal: p.terminal,
	})
	if err != nil {
		return fmt.Errorf("container %s: %w", t.id, err)
	}
	defer func() {
		if err != nil {
			_ = p.relay.Close()
		}
	}()
	var pod pods.Pod
	if mode == pods.ModeSingle {
		if pod, err = s.makePod(ctx, t, r, mode, spec); err != nil {
			return err
		}
		defer func() {
			if err != nil {
				stopPod(ctx, pod, s.Holder)
			}
		}()
	} else if pod, _, _, err = s.Holder.Get(); err != nil {
		return fmt.Errorf("container %s: %v: %w", t.id, err, errdefs.ErrFailedPrecondition)
	}
	var console *specs.Box
	if spec.Process != nil {
		console = spec.Process.ConsoleSize
	}
	c, err := pod.CreateContainer(ctx, vc.ContainerConfig{
		ID: t.id, Bundle: t.bundle, Spec: spec, Rootfs: r.GetRootfs(),
		Stdio: p.wanted(console), IO: p.relay,
		HooksDone: mode == pods.ModeSingle,
	})
	if err != nil {
		return err
	}
	t.container = c
	if mode == pods.ModeSingle {
		t.container = &singleContainer{Container: c, pod: pod, holder: s.Holder}
	}
	return nil
}

// wanted tells which streams the guest is to make.
func (p *process) wanted(console *specs.Box) vc.Stdio {
	w := vc.Stdio{
		Stdin: p.stdin != "", Stdout: p.stdout != "", Stderr: p.stderr != "" && !p.terminal, Terminal: p.terminal,
	}
	if console != nil && p.terminal {
		w.Width, w.Height = uint32(console.Width), uint32(console.Height)
	}
	return w
}

// stopPod ends a pod whose container could not be made.
func stopPod(ctx context.Context, pod pods.Pod, holder *pods.Holder) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoTime)
	defer cancel()
	if err := pod.Stop(ctx); err != nil {
		log.G(ctx).WithError(err).Error("the pod of a container that was not created cannot be stopped")
	}
	holder.Release()
}
