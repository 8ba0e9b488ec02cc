// SPDX-License-Identifier: Apache-2.0

package podtest

import (
	"context"
	"encoding/json"
	"fmt"
	"sync"
	"time"

	"github.com/containerd/cgroups/v3/cgroup2/stats"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/cloister-project/cloister/shim/pods"
	vc "github.com/cloister-project/cloister/virtcontainers"
)

// PID of every pod's VMM.
const PID = 4711

// Pod is a pods.Pod.
type Pod struct {
	Config vc.PodConfig
	// OnStart and OnCreate, where set, are called by Start and CreateContainer and give their errors.
	OnStart, OnCreate func(ctx context.Context) error

	mu         sync.Mutex
	state      vc.PodState
	exit       vc.Exit
	done       chan struct{}
	containers map[string]*Container
	// Stops, Updates and Pings count calls.
	Stops, Pings int
	Updates      []*specs.LinuxResources
}

// Factory is a NewFunc that keeps its pods.
type Factory struct {
	// Err of New.
	Err error
	// Prepare, where set, sees each new pod.
	Prepare func(p *Pod)

	mu   sync.Mutex
	pods []*Pod
}

// New is a pods.NewFunc.
func (f *Factory) New(_ context.Context, cfg vc.PodConfig) (pods.Pod, error) {
	if f.Err != nil {
		return nil, f.Err
	}
	p := &Pod{Config: cfg, state: vc.PodCreated, done: make(chan struct{}), containers: map[string]*Container{}}
	if f.Prepare != nil {
		f.Prepare(p)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.pods = append(f.pods, p)
	return p, nil
}

// Last pod that was made; nil if none was.
func (f *Factory) Last() *Pod {
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.pods) == 0 {
		return nil
	}
	return f.pods[len(f.pods)-1]
}

// Start boots nothing.
func (p *Pod) Start(ctx context.Context) error {
	p.mu.Lock()
	state := p.state
	p.mu.Unlock()
	if state != vc.PodCreated {
		return fmt.Errorf("pod is %s: %w", state, errdefs.ErrFailedPrecondition)
	}
	if p.OnStart != nil {
		if err := p.OnStart(ctx); err != nil {
			p.Lose(err)
			return err
		}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.state = vc.PodReady
	return nil
}

// Stop ends the pod.
func (p *Pod) Stop(context.Context) error {
	p.mu.Lock()
	p.Stops++
	p.mu.Unlock()
	p.end(vc.Exit{At: time.Now()})
	return nil
}

// Lose ends the pod as if its VM had died.
func (p *Pod) Lose(err error) {
	p.end(vc.Exit{Status: 137, At: time.Now(), Err: err})
}

func (p *Pod) end(exit vc.Exit) {
	p.mu.Lock()
	if p.state == vc.PodStopped {
		p.mu.Unlock()
		return
	}
	p.state, p.exit = vc.PodStopped, exit
	var all []*Container
	for _, c := range p.containers {
		all = append(all, c)
	}
	p.mu.Unlock()
	for _, c := range all {
		c.lost()
	}
	close(p.done)
}

// Done is closed when the pod has ended.
func (p *Pod) Done() <-chan struct{} { return p.done }

// Exit of the pod.
func (p *Pod) Exit() vc.Exit {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.exit
}

// Info of the pod.
func (p *Pod) Info() vc.PodInfo {
	p.mu.Lock()
	defer p.mu.Unlock()
	return vc.PodInfo{
		ID: p.Config.ID, State: p.state, PID: PID, CreatedAt: time.Unix(1700000000, 0), Extra: map[string]string{"accelerator": "tcg"},
	}
}

// Ready reports whether the pod runs.
func (p *Pod) Ready() bool { return p.Info().State == vc.PodReady }

// Ping works while the pod runs.
func (p *Pod) Ping(context.Context) error {
	if !p.Ready() {
		return errdefs.ErrUnavailable
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.Pings++
	return nil
}

// Stats are made up.
func (p *Pod) Stats(context.Context) (*stats.Metrics, error) {
	return &stats.Metrics{Pids: &stats.PidsStat{Current: 99}}, nil
}

// StorageUsage is what every pod says of its storage, as JSON.
const StorageUsage = `{"writableLayers":{"c":{"usedBytes":4096,"usedInodes":2}},"emptyDirs":{"tmp":{"usedBytes":0,"usedInodes":1}}}`

// StorageUsage is made up.
func (p *Pod) StorageUsage(context.Context) (*vc.StorageUsage, error) {
	if !p.Ready() {
		return nil, errdefs.ErrUnavailable
	}
	usage := &vc.StorageUsage{}
	return usage, json.Unmarshal([]byte(StorageUsage), usage)
}

// Update keeps what it gets.
func (p *Pod) Update(_ context.Context, r *specs.LinuxResources) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.Updates = append(p.Updates, r)
	return nil
}

// CreateContainer makes a container.
func (p *Pod) CreateContainer(ctx context.Context, cfg vc.ContainerConfig) (pods.Container, error) {
	if p.OnCreate != nil {
		if err := p.OnCreate(ctx); err != nil {
			_ = cfg.IO.Close()
			return nil, err
		}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.state != vc.PodReady {
		_ = cfg.IO.Close()
		return nil, fmt.Errorf("pod is %s: %w", p.state, errdefs.ErrFailedPrecondition)
	}
	c := &Container{Config: cfg, Pod: p, execs: map[string]*Process{}}
	c.init = newProcess(c, "", cfg.Stdio, cfg.IO)
	p.containers[cfg.ID] = c
	cfg.IO.Attach(nil, nil, nil)
	return c, nil
}

// Container returns a container that was made; nil if there is none.
func (p *Pod) Container(id string) *Container {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.containers[id]
}

// Container is a pods.Container.
type Container struct {
	Config vc.ContainerConfig
	Pod    *Pod
	// OnDelete, where set, is called by Delete and returns its error.
	OnDelete func(ctx context.Context) error
	// OnExecStart, where set, is called by the Start of an exec.
	OnExecStart func(ctx context.Context) error

	init *Process

	mu      sync.Mutex
	execs   map[string]*Process
	Updates []*specs.LinuxResources
	Paused  bool
}

// Init process.
func (c *Container) Init() pods.Process { return c.init }

// InitProcess is Init with its own type.
func (c *Container) InitProcess() *Process { return c.init }

// Exec makes a process.
func (c *Container) Exec(_ context.Context, cfg vc.ExecConfig) (pods.Process, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	p := newProcess(c, cfg.ID, cfg.Stdio, cfg.IO)
	p.Spec = cfg.Process
	c.execs[cfg.ID] = p
	cfg.IO.Attach(nil, nil, nil)
	return p, nil
}

// ExecProcess returns an exec.
func (c *Container) ExecProcess(id string) *Process {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.execs[id]
}

func (c *Container) all() []*Process {
	c.mu.Lock()
	defer c.mu.Unlock()
	var all []*Process
	for _, p := range c.execs {
		all = append(all, p)
	}
	return all
}

func (c *Container) lost() {
	c.init.Exit(137)
	for _, p := range c.all() {
		p.Exit(137)
	}
}

// Pause only notes it.
func (c *Container) Pause(context.Context) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.Paused = true
	return nil
}

// Resume only notes it.
func (c *Container) Resume(context.Context) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.Paused = false
	return nil
}

// Update keeps what it gets.
func (c *Container) Update(_ context.Context, r *specs.LinuxResources) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.Updates = append(c.Updates, r)
	return nil
}

// Stats are made up.
func (c *Container) Stats(context.Context) (*stats.Metrics, error) {
	return &stats.Metrics{MemoryEvents: &stats.MemoryEvents{OomKill: 1}}, nil
}

// Delete refuses a container that runs; one that never ran is killed.
func (c *Container) Delete(ctx context.Context) (vc.Exit, error) {
	switch c.init.State().Status {
	case vc.ProcessRunning:
		return vc.Exit{}, fmt.Errorf("running: %w", errdefs.ErrFailedPrecondition)
	case vc.ProcessCreated:
		c.init.Exit(137)
	}
	if c.OnDelete != nil {
		if err := c.OnDelete(ctx); err != nil {
			return vc.Exit{}, err
		}
	}
	c.Pod.mu.Lock()
	delete(c.Pod.containers, c.Config.ID)
	c.Pod.mu.Unlock()
	return c.init.Wait(ctx)
}

// Process is a pods.Process.
type Process struct {
	Spec *specs.Process
	// OnStart, where set, is called by Start and returns its error.
	OnStart func(ctx context.Context) error

	c      *Container
	execID string
	stdio  vc.Stdio
	io     vc.ProcessIO
	done   chan struct{}

	mu     sync.Mutex
	status vc.ProcessStatus
	exit   vc.Exit
	// Signals that were sent; those of KillAll also count in All.
	Signals []uint32
	All     int
	Size    [2]uint32
}

func newProcess(c *Container, id string, stdio vc.Stdio, io vc.ProcessIO) *Process {
	return &Process{c: c, execID: id, stdio: stdio, io: io, done: make(chan struct{}), status: vc.ProcessCreated}
}

// Start lets it run.
func (p *Process) Start(ctx context.Context) error {
	on := p.OnStart
	if p.execID != "" {
		on = p.c.OnExecStart
	}
	p.mu.Lock()
	if p.status != vc.ProcessCreated {
		p.mu.Unlock()
		return fmt.Errorf("process is %s: %w", p.status, errdefs.ErrFailedPrecondition)
	}
	p.status = vc.ProcessRunning
	p.mu.Unlock()
	if on != nil {
		if err := on(ctx); err != nil {
			if p.execID != "" {
				p.Exit(127)
			} else {
				p.mu.Lock()
				p.status = vc.ProcessCreated
				p.mu.Unlock()
			}
			return err
		}
	}
	return nil
}

// Exit ends the process.
func (p *Process) Exit(status uint32) {
	p.mu.Lock()
	if p.status == vc.ProcessStopped {
		p.mu.Unlock()
		return
	}
	p.status, p.exit = vc.ProcessStopped, vc.Exit{Status: status, At: time.Now()}
	p.mu.Unlock()
	close(p.done)
}

// Kill exits with 128+signal at SIGKILL, and otherwise only keeps the signal.
func (p *Process) Kill(_ context.Context, signal uint32, all bool) error {
	if p.State().Status == vc.ProcessStopped && !all {
		return fmt.Errorf("process already finished: %w", errdefs.ErrNotFound)
	}
	p.mu.Lock()
	p.Signals = append(p.Signals, signal)
	if all {
		p.All++
	}
	p.mu.Unlock()
	if signal == 9 {
		p.Exit(137)
	}
	return nil
}

// Resize keeps the size.
func (p *Process) Resize(_ context.Context, width, height uint32) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.Size = [2]uint32{width, height}
	return nil
}

// State of the process.
func (p *Process) State() vc.ProcessState {
	p.mu.Lock()
	defer p.mu.Unlock()
	return vc.ProcessState{Status: p.status, PID: PID, Exit: p.exit, Stdio: p.stdio}
}

// Wait for the end.
func (p *Process) Wait(ctx context.Context) (vc.Exit, error) {
	select {
	case <-p.done:
		p.mu.Lock()
		defer p.mu.Unlock()
		return p.exit, nil
	case <-ctx.Done():
		return vc.Exit{}, ctx.Err()
	}
}

// Delete forgets an exec.
func (p *Process) Delete(context.Context) (vc.Exit, error) {
	state := p.State()
	if state.Status == vc.ProcessRunning {
		return vc.Exit{}, fmt.Errorf("running: %w", errdefs.ErrFailedPrecondition)
	}
	p.c.mu.Lock()
	delete(p.c.execs, p.execID)
	p.c.mu.Unlock()
	_ = p.io.Close()
	return state.Exit, nil
}
