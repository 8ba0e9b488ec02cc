// SPDX-License-Identifier: Apache-2.0

package container

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"github.com/containerd/cgroups/v3/cgroup2/stats"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	agentv1 "github.com/cloister-project/cloister/agent-protocol/v1"
	"github.com/cloister-project/cloister/agent-protocol/wire"
	"github.com/cloister-project/cloister/agent/ocispec"
	"github.com/cloister-project/cloister/internal/idmap"
)

// Storage is what containers need of the guest's storage (package agent/storage).
type Storage interface {
	// MountRootfs mounts a container's root filesystem and says where. ids is the map of the container's user namespace, if it has one.
	MountRootfs(ctx context.Context, containerID string, r *agentv1.Rootfs, readonly bool, ids idmap.Map) (string, error)
	// PrepareMounts turns the mounts of a request into mounts with sources in the guest.
	PrepareMounts(ctx context.Context, containerID string, mounts []*agentv1.Mount) ([]specs.Mount, error)
	// TerminationMessage returns what the container says of its end, in a file among its mounts.
	TerminationMessage(containerID string) ([]byte, error)
	// Remove undoes both and tells which disks are free now. It may be called for a container that it does not know.
	Remove(ctx context.Context, containerID string) ([]string, error)
}

// Config is what a Manager works with.
type Config struct {
	// StateDir is a directory on tmpfs that nobody else writes into.
	StateDir string
	Storage  Storage
	// Cgroup is the parent of the containers' cgroups, DefaultCgroup if empty.
	Cgroup string
	// Streams are the stdio connections of the host.
	Streams *Streams
}

// DefaultCgroup holds one child for each container. It is absolute from the root of the cgroup hierarchy.
const DefaultCgroup = "/pod"

// Manager runs the pod's containers. See the package's documentation for states and locks.
type Manager struct {
	cfg    Config
	guest  *ocispec.Guest
	events *eventLog
	oom    *oomWatcher

	closing sync.Once

	mu          sync.Mutex
	closed      bool
	pod         *pod
	configuring bool
	containers  map[string]*container
}

// NewManager makes a manager without containers.
func NewManager(cfg Config) (*Manager, error) {
	if cfg.Cgroup == "" {
		cfg.Cgroup = DefaultCgroup
	}
	if err := os.MkdirAll(filepath.Join(cfg.StateDir, "containers"), 0o711); err != nil {
		return nil, fmt.Errorf("make the state directory of containers: %w", err)
	}
	oom, err := newOOMWatcher()
	if err != nil {
		return nil, fmt.Errorf("watch for OOM kills: %w", err)
	}
	g := ocispec.Inspect()
	g.Cgroup = cfg.Cgroup
	return &Manager{cfg: cfg, guest: g, events: newEventLog(), oom: oom, containers: map[string]*container{}}, nil
}

// reserve puts a new container's place into the map.
func (m *Manager) reserve(id string) (*container, *ocispec.Guest, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return nil, nil, errShutsDown()
	}
	if m.pod == nil {
		return nil, nil, fmt.Errorf("the pod is not configured yet: call ConfigureSandbox first: %w", errdefs.ErrFailedPrecondition)
	}
	if _, ok := m.containers[id]; ok {
		return nil, nil, fmt.Errorf("container %q exists: %w", id, errdefs.ErrAlreadyExists)
	}
	if len(m.containers) >= wire.MaxContainers {
		return nil, nil, fmt.Errorf("the pod has %d containers, the limit: %w", len(m.containers), errdefs.ErrResourceExhausted)
	}
	c := newContainer(m, id)
	m.containers[id] = c
	g := *m.guest
	g.IPC, g.UTS = nsPath(m.pod.ipc), nsPath(m.pod.uts)
	return c, &g, nil
}

func (m *Manager) drop(id string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.containers, id)
}

// get finds a container that has been created.
func (m *Manager) get(id string) (*container, error) {
	m.mu.Lock()
	c, ok := m.containers[id]
	m.mu.Unlock()
	if !ok {
		return nil, fmt.Errorf("container %q: %w", id, errdefs.ErrNotFound)
	}
	if state := c.currentState(); state == stateCreating {
		return nil, fmt.Errorf("container %q is being created: %w", id, errdefs.ErrFailedPrecondition)
	}
	return c, nil
}

// process finds a process; an empty execID means the container's init.
func (m *Manager) process(containerID, execID string) (*process, error) {
	c, err := m.get(containerID)
	if err != nil {
		return nil, err
	}
	if execID == "" {
		return c.init, nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	p, ok := c.execs[execID]
	if !ok {
		return nil, fmt.Errorf("process %q of container %q: %w", execID, containerID, errdefs.ErrNotFound)
	}
	return p, nil
}

// Create builds a container up to its start: its init waits. If it fails nothing of it is left.
func (m *Manager) Create(ctx context.Context, req *agentv1.CreateContainerRequest) error {
	id := req.GetContainerId()
	switch {
	case !wire.ValidID(id):
		return refused("container id %q is not valid", id)
	case len(req.GetRootfs().GetLayers()) > wire.MaxLayers:
		return refused("the root filesystem has %d layers, the limit is %d", len(req.GetRootfs().GetLayers()), wire.MaxLayers)
	case len(req.GetMounts()) > wire.MaxMounts:
		return refused("the container has %d mounts, the limit is %d", len(req.GetMounts()), wire.MaxMounts)
	}
	stdio, err := parseStdio(req.GetStdio())
	if err != nil {
		return err
	}
	in, err := ocispec.DecodeContainer(req.GetSpec())
	if err != nil {
		return err
	}
	c, g, err := m.reserve(id)
	if err != nil {
		return err
	}
	if err := m.build(ctx, c, g, in, stdio, req); err != nil {
		m.drop(id)
		return fmt.Errorf("create container %q: %w", id, err)
	}
	return nil
}

// build makes a container that has its place in the map.
func (m *Manager) build(ctx context.Context, c *container, g *ocispec.Guest, in *specs.Spec, stdio stdioSpec,
	req *agentv1.CreateContainerRequest) error {
	if target := req.GetPidTarget(); target != "" {
		if !ocispec.JoinsPID(in) {
			return refused("pid_target is %q, and spec joins no pid namespace", target)
		}
		ns, err := m.openPID(target)
		if err != nil {
			return fmt.Errorf("join the pid namespace of container %q: %w", target, err)
		}
		defer ns.Close() // libcontainer has joined it then
		g.PID = nsPath(ns)
	}
	ids := idsOf(in)
	users, processes, err := m.join(ctx, ids, g.PID == "" && !ocispec.OwnPID(in))
	if err != nil {
		return err
	}
	if processes != "" {
		g.PID = processes
	}
	spec, err := g.Container(c.id, in, stdio.terminal)
	if err != nil {
		return err
	}
	mapped := slices.IndexFunc(req.GetMounts(), (*agentv1.Mount).GetIdMapped)
	if mapped >= 0 && ids.IsZero() {
		return refused("mount %d is id-mapped, and the container has no user namespace", mapped+1)
	}
	for i, ns := range spec.Linux.Namespaces {
		if ns.Type == specs.UserNamespace {
			spec.Linux.Namespaces[i].Path = users
		}
	}
	return c.create(ctx, spec, stdio, req)
}

// openPID opens the pid namespace of a container whose init is alive.
func (m *Manager) openPID(id string) (*os.File, error) {
	p, err := m.process(id, "")
	if err != nil {
		return nil, err
	}
	p.c.mu.Lock()
	reaped := p.reaped
	p.c.mu.Unlock()
	if reaped {
		return nil, errStopped()
	}
	ns, err := os.Open(fmt.Sprintf("/proc/%d/ns/pid", p.pid))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	// The pid could be another process's by now, unless the init, which its pidfd names, is there still.
	if err != nil || p.lp.Signal(unix.Signal(0)) != nil {
		_ = ns.Close() // of nil too
		return nil, errStopped()
	}
	return ns, nil
}

// CreateProcess adds a process to a container. Nothing runs before Start.
func (m *Manager) CreateProcess(_ context.Context, req *agentv1.CreateProcessRequest) error {
	if id := req.GetExecId(); !wire.ValidID(id) {
		return refused("exec id %q is not valid", id)
	}
	stdio, err := parseStdio(req.GetStdio())
	if err != nil {
		return err
	}
	in, err := ocispec.DecodeProcess(req.GetProcess())
	if err != nil {
		return err
	}
	spec, err := m.guest.Process(in, stdio.terminal)
	if err != nil {
		return err
	}
	c, err := m.get(req.GetContainerId())
	if err != nil {
		return err
	}
	return c.addProcess(req.GetExecId(), spec, stdio)
}

// Start starts a container's init or a further process and returns its pid in the guest's root pid namespace.
func (m *Manager) Start(ctx context.Context, containerID, execID string) (int, error) {
	p, err := m.process(containerID, execID)
	if err != nil {
		return 0, err
	}
	if execID == "" {
		err = p.c.start(ctx)
	} else {
		err = p.start()
	}
	if err != nil {
		return 0, fmt.Errorf("start %s: %w", p, err)
	}
	return p.pid, nil
}

// Wait waits for a process's exit, see agentv1.
func (m *Manager) Wait(ctx context.Context, containerID, execID string) (*agentv1.WaitProcessResponse, error) {
	p, err := m.process(containerID, execID)
	if err != nil {
		return nil, err
	}
	select {
	case <-p.done:
		return p.exitResponse(), nil
	case <-ctx.Done():
		return nil, fmt.Errorf("wait for %s: %w", p, ctx.Err())
	}
}

// Signal sends a signal to a process, or to all of a container.
func (m *Manager) Signal(containerID, execID string, signal uint32, all bool) error {
	const maxSignal = 64 // SIGRTMAX
	if signal == 0 || signal > maxSignal {
		return refused("signal %d does not exist", signal)
	}
	p, err := m.process(containerID, execID)
	if err != nil {
		return err
	}
	if all {
		return p.c.signalAll(signal)
	}
	return p.signal(signal)
}

// Resize sets the window size of a process's terminal, in character cells.
func (m *Manager) Resize(containerID, execID string, width, height uint32) error {
	w, h, err := windowSize(width, height)
	if err != nil {
		return err
	}
	p, err := m.process(containerID, execID)
	if err != nil {
		return err
	}
	if !p.io.spec.terminal {
		return fmt.Errorf("%s has no terminal: %w", p, errdefs.ErrFailedPrecondition)
	}
	if err := p.io.resize(w, h); err != nil {
		return fmt.Errorf("resize the terminal of %s: %w", p, err)
	}
	return nil
}

// Delete forgets an exited process; with an empty execID it removes the container and tells which disks are free now.
func (m *Manager) Delete(ctx context.Context, containerID, execID string) ([]string, error) {
	p, err := m.process(containerID, execID)
	if err != nil {
		return nil, err
	}
	if execID != "" {
		return nil, p.delete()
	}
	return p.c.delete(ctx)
}

// Pause freezes a container.
func (m *Manager) Pause(ctx context.Context, id string) error {
	c, err := m.get(id)
	if err != nil {
		return err
	}
	return c.freeze(ctx, true)
}

// Resume thaws a container.
func (m *Manager) Resume(ctx context.Context, id string) error {
	c, err := m.get(id)
	if err != nil {
		return err
	}
	return c.freeze(ctx, false)
}

// Update changes a container's limits; resources is OCI LinuxResources in JSON.
func (m *Manager) Update(ctx context.Context, id string, resources []byte) error {
	in, err := ocispec.DecodeResources(resources)
	if err != nil {
		return err
	}
	update, err := m.guest.Resources(in)
	if err != nil {
		return err
	}
	c, err := m.get(id)
	if err != nil {
		return err
	}
	return c.update(ctx, update)
}

// Stats reads a container's cgroup, until Delete.
func (m *Manager) Stats(id string) (*stats.Metrics, error) {
	if _, err := m.get(id); err != nil {
		return nil, err
	}
	return cgroupStats(filepath.Join(m.cfg.Cgroup, id))
}

// PodStats sums up all containers, and the CPU time of the whole guest.
func (m *Manager) PodStats() (*stats.Metrics, error) {
	sum, err := cgroupStats(m.cfg.Cgroup)
	if err != nil {
		return nil, err
	}
	root, err := cgroupStats("/")
	if err != nil {
		return nil, err
	}
	sum.CPU = root.CPU
	return sum, nil
}

// NextEvents waits for events with a sequence number above after.
func (m *Manager) NextEvents(ctx context.Context, after uint64) ([]*agentv1.Event, error) {
	return m.events.next(ctx, after)
}

// Close ends all processes, at most until ctx ends. No container can be made any more; those that exist stay for Wait,
// and their file systems stay mounted: the guest ends. Further calls do nothing.
func (m *Manager) Close(ctx context.Context) { m.closing.Do(func() { m.close(ctx) }) }

func (m *Manager) close(ctx context.Context) {
	m.mu.Lock()
	m.closed = true
	var all []*container
	for _, c := range m.containers {
		all = append(all, c)
	}
	p := m.pod
	m.mu.Unlock()
	var wg sync.WaitGroup
	for _, c := range all {
		wg.Go(func() {
			if err := c.kill(ctx); err != nil {
				log.G(ctx).WithError(err).WithField("container", c.id).Warn("container is left at shutdown")
			}
		})
	}
	wg.Wait()
	m.cfg.Streams.Close()
	m.oom.close()
	if p != nil {
		p.close()
	}
}
