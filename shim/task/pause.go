// SPDX-License-Identifier: Apache-2.0

package task

import (
	"context"
	"fmt"
	"sync"
	"syscall"

	"github.com/containerd/cgroups/v3/cgroup2/stats"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/cloister-project/cloister/shim/pods"
	vc "github.com/cloister-project/cloister/virtcontainers"
)

// pauseContainer stands for the pod in containerd's classic mode. There is no process behind it: it runs as long as
// the pod, and a signal that would end a pause program stops the pod.
type pauseContainer struct {
	pod    pods.Pod
	holder *pods.Holder

	mu      sync.Mutex
	started bool
	// killed is the signal that stopped the pod, 0 if none did.
	killed syscall.Signal
}

func newPauseContainer(pod pods.Pod, holder *pods.Holder) *pauseContainer {
	return &pauseContainer{pod: pod, holder: holder}
}

func (c *pauseContainer) Init() pods.Process { return (*pauseProcess)(c) }

func notForPause(what string) error {
	return fmt.Errorf("%s: the sandbox's pause container has no processes: %w", what, errdefs.ErrNotImplemented)
}

func (c *pauseContainer) Exec(context.Context, vc.ExecConfig) (pods.Process, error) {
	return nil, notForPause("exec")
}
func (c *pauseContainer) Pause(context.Context) error  { return notForPause("pause") }
func (c *pauseContainer) Resume(context.Context) error { return notForPause("resume") }

// Update is for the whole pod.
func (c *pauseContainer) Update(ctx context.Context, r *specs.LinuxResources) error {
	return c.pod.Update(ctx, r)
}

// Stats are the whole pod's.
func (c *pauseContainer) Stats(ctx context.Context) (*stats.Metrics, error) { return c.pod.Stats(ctx) }

// Delete ends the pod if it was never started, and then forgets it.
func (c *pauseContainer) Delete(ctx context.Context) (vc.Exit, error) {
	if state := c.Init().State(); state.Status == vc.ProcessRunning {
		return vc.Exit{}, fmt.Errorf("the sandbox's pause container is running: %w", errdefs.ErrFailedPrecondition)
	}
	if err := c.pod.Stop(ctx); err != nil {
		return vc.Exit{}, err
	}
	c.holder.Release()
	return c.exit(), nil
}

// exit is valid when the pod has ended.
func (c *pauseContainer) exit() vc.Exit {
	c.mu.Lock()
	killed := c.killed
	c.mu.Unlock()
	exit := c.pod.Exit()
	switch killed {
	case 0:
	case syscall.SIGKILL:
		exit.Status, exit.Err = 128+uint32(killed), nil
	default:
		// The pause program ends well at SIGTERM and SIGINT.
		exit.Status, exit.Err = 0, nil
	}
	return exit
}

// pauseProcess is the pauseContainer as its own init.
type pauseProcess pauseContainer

func (p *pauseProcess) container() *pauseContainer { return (*pauseContainer)(p) }

func (p *pauseProcess) done() bool {
	select {
	case <-p.pod.Done():
		return true
	default:
		return false
	}
}

// Start works while the pod lives.
func (p *pauseProcess) Start(context.Context) error {
	if p.done() {
		return fmt.Errorf("the sandbox has ended: %w", errdefs.ErrFailedPrecondition)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.started = true
	return nil
}

// Kill begins to stop the pod at the signals that end a pause program; it ignores others.
func (p *pauseProcess) Kill(_ context.Context, signal uint32, _ bool) error {
	if p.done() {
		return fmt.Errorf("process already finished: %w", errdefs.ErrNotFound)
	}
	switch s := syscall.Signal(signal); s {
	case syscall.SIGKILL, syscall.SIGTERM, syscall.SIGINT:
		p.mu.Lock()
		if p.killed == 0 {
			p.killed = s
		}
		p.mu.Unlock()
		// The exit tells when it is over. Stop needs no context but for waiting.
		go func() { _ = p.pod.Stop(context.Background()) }()
	}
	return nil
}

// Resize fails: there is no terminal.
func (p *pauseProcess) Resize(context.Context, uint32, uint32) error {
	return notForPause("resize of a terminal")
}

// State follows the pod's.
func (p *pauseProcess) State() vc.ProcessState {
	s := vc.ProcessState{Status: vc.ProcessCreated, PID: p.pod.Info().PID}
	if p.done() {
		s.Status, s.Exit = vc.ProcessStopped, p.container().exit()
		return s
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.started {
		s.Status = vc.ProcessRunning
	}
	return s
}

// Wait for the pod's end.
func (p *pauseProcess) Wait(ctx context.Context) (vc.Exit, error) {
	select {
	case <-p.pod.Done():
		return p.container().exit(), nil
	case <-ctx.Done():
		return vc.Exit{}, ctx.Err()
	}
}

// Delete is for execs.
func (p *pauseProcess) Delete(context.Context) (vc.Exit, error) {
	return vc.Exit{}, notForPause("delete of a process")
}

// singleContainer is a container that is alone in its pod: they end together.
type singleContainer struct {
	pods.Container
	pod    pods.Pod
	holder *pods.Holder

	mu      sync.Mutex
	deleted bool
	exit    vc.Exit
}

// Delete removes the container and then stops the pod. When it fails between the two, a repeat goes on from there.
func (c *singleContainer) Delete(ctx context.Context) (vc.Exit, error) {
	c.mu.Lock()
	deleted := c.deleted
	c.mu.Unlock()
	if !deleted {
		exit, err := c.Container.Delete(ctx)
		if err != nil {
			return vc.Exit{}, err
		}
		c.mu.Lock()
		c.deleted, c.exit = true, exit
		c.mu.Unlock()
	}
	if err := c.pod.Stop(ctx); err != nil {
		return vc.Exit{}, err
	}
	c.holder.Release()
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.exit, nil
}
