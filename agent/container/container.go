// SPDX-License-Identifier: Apache-2.0

package container

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/opencontainers/runc/libcontainer"
	"github.com/opencontainers/runc/libcontainer/specconv"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	agentv1 "github.com/cloister-project/cloister/agent-protocol/v1"
	"github.com/cloister-project/cloister/agent-protocol/wire"
	"github.com/cloister-project/cloister/agent/ocispec"
	"github.com/cloister-project/cloister/internal/idmap"
)

// Budgets of steps that wait for the kernel or run after the caller has given up.
const (
	undoBudget  = 30 * time.Second
	emptyBudget = 10 * time.Second
)

type state int

const (
	stateCreating state = iota
	stateCreated
	stateRunning
	statePaused
	stateStopped
	stateDeleting
)

func (s state) String() string {
	return [...]string{"being created", "created", "running", "paused", "stopped", "being deleted"}[s]
}

// container is one container of the pod.
type container struct {
	id     string
	m      *Manager
	dir    string        // of its cgroup
	lane   chan struct{} // holds the one operation that changes the container; see doc.go
	ownPID bool

	// Set by create, constant from then on.
	lc      *libcontainer.Container
	init    *process
	unwatch func()

	// Owned by whoever is in the lane.
	limits  *specs.LinuxResources
	cgroups string

	mu    sync.Mutex
	state state
	execs map[string]*process

	oomMu    sync.Mutex
	oomKills uint64
}

func newContainer(m *Manager, id string) *container {
	return &container{
		id:    id,
		m:     m,
		dir:   filepath.Join(cgroupMount, m.cfg.Cgroup, id),
		lane:  make(chan struct{}, 1),
		execs: map[string]*process{},
	}
}

func (c *container) currentState() state {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.state
}

// enter waits for the lane.
func (c *container) enter(ctx context.Context) error {
	select {
	case c.lane <- struct{}{}:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("another operation on container %q takes its time: %w", c.id, ctx.Err())
	}
}

func (c *container) leave() { <-c.lane }

func (c *container) wrongState(what string, s state) error {
	return fmt.Errorf("cannot %s container %q: it is %s: %w", what, c.id, s, errdefs.ErrFailedPrecondition)
}

// create does everything up to the start. On an error it has undone all of it.
func (c *container) create(ctx context.Context, spec *specs.Spec, stdio stdioSpec, req *agentv1.CreateContainerRequest) (err error) {
	if err := c.enter(ctx); err != nil {
		return err
	}
	defer c.leave()

	var undo []func(context.Context) error
	defer func() {
		if err == nil {
			return
		}
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoBudget)
		defer cancel()
		for i := len(undo) - 1; i >= 0; i-- {
			if uerr := undo[i](ctx); uerr != nil {
				log.G(ctx).WithError(uerr).WithField("container", c.id).Error("undo a container's creation")
			}
		}
	}()

	streams := c.m.cfg.Streams
	if err := streams.expect(stdio.ids()); err != nil {
		return err
	}
	undo = append(undo, func(context.Context) error { streams.forget(stdio.ids()); return nil })

	undo = append(undo, func(ctx context.Context) error { _, err := c.m.cfg.Storage.Remove(ctx, c.id); return err })
	ids := idmap.Of(spec.Linux.UIDMappings, spec.Linux.GIDMappings) // none without a user namespace
	if spec.Root.Path, err = c.m.cfg.Storage.MountRootfs(ctx, c.id, req.GetRootfs(), spec.Root.Readonly, ids); err != nil {
		return err
	}
	if spec.Mounts, err = c.m.cfg.Storage.PrepareMounts(ctx, c.id, req.GetMounts()); err != nil {
		return err
	}
	if !ids.IsZero() {
		c.m.bindKernelFilesystems(spec)
	}

	config, err := specconv.CreateLibcontainerConfig(&specconv.CreateOpts{CgroupName: c.id, Spec: spec})
	if err != nil {
		return withKind(err, errdefs.ErrInvalidArgument)
	}
	owner, err := config.HostRootUID()
	if err != nil {
		return withKind(err, errdefs.ErrInvalidArgument)
	}
	group, err := config.HostRootGID()
	if err != nil {
		return withKind(err, errdefs.ErrInvalidArgument)
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	c.ownPID = ocispec.OwnNamespace(spec.Linux, specs.PIDNamespace)
	c.limits, c.cgroups = spec.Linux.Resources, spec.Linux.CgroupsPath
	if c.lc, err = libcontainer.Create(filepath.Join(c.m.cfg.StateDir, "containers"), c.id, config); err != nil {
		return withKind(err, errdefs.ErrInvalidArgument)
	}
	undo = append(undo, func(context.Context) error { return c.lc.Destroy() })

	p := newProcess(c, "", spec.Process, stdio)
	p.lp.Init = true
	if err := p.io.open(p.lp, owner, group); err != nil {
		return err
	}
	undo = append(undo, func(context.Context) error { p.io.close(); return nil })
	if err := c.lc.Start(p.lp); err != nil {
		return withKind(err, errdefs.ErrInternal)
	}
	p.pid, _ = p.lp.Pid()
	c.mu.Lock()
	c.init, p.state = p, processStarting
	c.mu.Unlock()
	go p.waitExit()
	undo = append(undo, c.killAndWait)
	if err := p.io.childStarted(); err != nil {
		return err
	}
	if c.unwatch, err = c.m.oom.add(c.dir, c.checkOOM); err != nil {
		// Without the memory controller there are no OOM kills of this container to tell of.
		if !errors.Is(err, os.ErrNotExist) {
			log.G(ctx).WithError(err).WithField("container", c.id).Warn("OOM kills are not watched")
		}
		c.unwatch, err = func() {}, nil
	}
	undo = append(undo, func(context.Context) error { c.unwatch(); return nil })
	if err := ctx.Err(); err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.state = stateCreated
	if p.reaped {
		c.state = stateStopped
	}
	return nil
}

// bindKernelFilesystems replaces mounts that the kernel refuses in a user namespace which does not own the pod's network
// and IPC namespaces by binds of the guest's.
func (m *Manager) bindKernelFilesystems(spec *specs.Spec) {
	m.mu.Lock()
	mqueue := m.pod.mqueue
	m.mu.Unlock()
	for i, mount := range spec.Mounts {
		switch {
		case mount.Type == "sysfs":
			spec.Mounts[i].Type, spec.Mounts[i].Source = "bind", "/sys"
			spec.Mounts[i].Options = append(mount.Options[:len(mount.Options):len(mount.Options)], "rbind", "ro")
		case mount.Type == "mqueue" && mqueue != "" && !ocispec.OwnNamespace(spec.Linux, specs.IPCNamespace):
			spec.Mounts[i].Type, spec.Mounts[i].Source = "bind", mqueue
			spec.Mounts[i].Options = append(mount.Options[:len(mount.Options):len(mount.Options)], "bind")
		}
	}
}

// start lets the init run.
func (c *container) start(ctx context.Context) error {
	if err := c.enter(ctx); err != nil {
		return err
	}
	defer c.leave()
	if s := c.currentState(); s != stateCreated {
		return c.wrongState("start", s)
	}
	p := c.init
	conns, err := c.m.cfg.Streams.take(p.io.spec.ids())
	if err != nil {
		return err
	}
	p.io.attach(conns)
	c.mu.Lock()
	if p.state == processStarting {
		p.state = processRunning
	}
	if c.state == stateCreated {
		c.state = stateRunning
	}
	c.mu.Unlock()
	if err := p.release(ctx, filepath.Join(c.m.cfg.StateDir, "containers", c.id, "exec.fifo")); err != nil {
		return withKind(fmt.Errorf("unable to start container process: %w", err), errdefs.ErrFailedPrecondition)
	}
	return nil
}

// addProcess records a further process.
func (c *container) addProcess(id string, spec *specs.Process, stdio stdioSpec) error {
	p := newProcess(c, id, spec, stdio)
	if err := c.m.cfg.Streams.expect(stdio.ids()); err != nil {
		return err
	}
	err := func() error {
		c.mu.Lock()
		defer c.mu.Unlock()
		switch {
		case c.state != stateCreated && c.state != stateRunning && c.state != statePaused:
			return c.wrongState("exec in", c.state)
		case c.execs[id] != nil:
			return fmt.Errorf("process %q of container %q exists: %w", id, c.id, errdefs.ErrAlreadyExists)
		case len(c.execs) >= wire.MaxProcesses:
			return fmt.Errorf("container %q has %d processes, the limit: %w", c.id, len(c.execs), errdefs.ErrResourceExhausted)
		}
		c.execs[id] = p
		return nil
	}()
	if err != nil {
		c.m.cfg.Streams.forget(stdio.ids())
	}
	return err
}

// freeze pauses or resumes.
func (c *container) freeze(ctx context.Context, frozen bool) error {
	if err := c.enter(ctx); err != nil {
		return err
	}
	defer c.leave()
	from, to, what, do := stateRunning, statePaused, "pause", c.lc.Pause
	if !frozen {
		from, to, what, do = statePaused, stateRunning, "resume", c.lc.Resume
	}
	if s := c.currentState(); s != from {
		return c.wrongState(what, s)
	}
	if err := do(); err != nil {
		return fmt.Errorf("%s container %q: %w", what, c.id, err)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.state == from {
		c.state = to
	}
	return nil
}

// update sets new limits.
func (c *container) update(ctx context.Context, update *specs.LinuxResources) error {
	if err := c.enter(ctx); err != nil {
		return err
	}
	defer c.leave()
	if s := c.currentState(); s != stateCreated && s != stateRunning && s != statePaused {
		return c.wrongState("update", s)
	}
	limits := ocispec.MergeResources(c.limits, update)
	cgroup, err := specconv.CreateCgroupConfig(&specconv.CreateOpts{
		CgroupName: c.id,
		Spec:       &specs.Spec{Linux: &specs.Linux{CgroupsPath: c.cgroups, Resources: limits}},
	}, specconv.AllowedDevices)
	if err != nil {
		return withKind(fmt.Errorf("update container %q: %w", c.id, err), errdefs.ErrInvalidArgument)
	}
	config := c.lc.Config()
	have := *config.Cgroups
	have.Resources = cgroup.Resources
	config.Cgroups = &have
	if err := c.lc.Set(config); err != nil {
		return fmt.Errorf("update container %q: %w", c.id, err)
	}
	c.limits = limits
	return nil
}

// signalAll signals every process of the container, and only of this one, whatever pid namespace it is in.
func (c *container) signalAll(signal uint32) error {
	if s := c.currentState(); s == stateStopped || s == stateDeleting {
		return errProcessFinished()
	}
	if unix.Signal(signal) == unix.SIGKILL {
		if err := killCgroup(c.dir); err == nil {
			return nil
		} else if !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("kill container %q: %w", c.id, err)
		}
	}
	pids, err := c.lc.Processes()
	if err != nil {
		return fmt.Errorf("list the processes of container %q: %w", c.id, err)
	}
	var failed error
	for _, pid := range pids {
		if err := unix.Kill(pid, unix.Signal(signal)); err != nil && err != unix.ESRCH {
			failed = errors.Join(failed, fmt.Errorf("kill %d: %w", pid, err))
		}
	}
	return failed
}

// killAndWait kills everything in the container and waits for its processes, their output included.
func (c *container) killAndWait(ctx context.Context) error {
	if err := c.signalAll(uint32(unix.SIGKILL)); err != nil && !errdefs.IsNotFound(err) {
		return err
	}
	if err := c.waitProcesses(ctx); err != nil {
		return err
	}
	return waitCgroupEmpty(ctx, c.dir, emptyBudget)
}

// waitProcesses waits for the exits of all processes that were started.
func (c *container) waitProcesses(ctx context.Context) error {
	c.mu.Lock()
	started := []*process{c.init}
	for _, p := range c.execs {
		if p.state != processCreated {
			started = append(started, p)
		}
	}
	c.mu.Unlock()
	for _, p := range started {
		select {
		case <-p.done:
		case <-ctx.Done():
			return fmt.Errorf("%s has not ended: %w", p, ctx.Err())
		}
	}
	return nil
}

// kill is killAndWait for a container in any state.
func (c *container) kill(ctx context.Context) error {
	if err := c.enter(ctx); err != nil {
		return err
	}
	defer c.leave()
	if c.currentState() == stateCreating {
		return nil
	}
	return c.killAndWait(ctx)
}

// delete removes a stopped container. After an error it may be called again.
func (c *container) delete(ctx context.Context) (released []string, err error) {
	if err := c.enter(ctx); err != nil {
		return nil, err
	}
	defer c.leave()
	c.mu.Lock()
	switch s := c.state; s {
	case stateStopped:
		c.state = stateDeleting
	case stateDeleting: // somebody was in the lane before
		c.mu.Unlock()
		return nil, fmt.Errorf("container %q: %w", c.id, errdefs.ErrNotFound)
	default:
		c.mu.Unlock()
		if s == stateCreated {
			return nil, fmt.Errorf("cannot delete container %q: its init waits to be started, kill it first: %w", c.id,
				errdefs.ErrFailedPrecondition)
		}
		return nil, fmt.Errorf("cannot delete container %q: container is running: %w", c.id, errdefs.ErrFailedPrecondition)
	}
	all := []*process{c.init}
	for _, p := range c.execs {
		all = append(all, p)
	}
	c.mu.Unlock()
	defer func() {
		if err != nil {
			c.mu.Lock()
			c.state = stateStopped
			c.mu.Unlock()
			err = fmt.Errorf("delete container %q: %w", c.id, err)
		}
	}()
	if err := killCgroup(c.dir); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	if err := c.waitProcesses(ctx); err != nil {
		return nil, err
	}
	if err := waitCgroupEmpty(ctx, c.dir, emptyBudget); err != nil {
		return nil, err
	}
	c.unwatch()
	if err := c.lc.Destroy(); err != nil {
		return nil, err
	}
	for _, p := range all {
		p.free()
	}
	if released, err = c.m.cfg.Storage.Remove(ctx, c.id); err != nil {
		return nil, err
	}
	c.m.drop(c.id)
	return released, nil
}

// checkOOM tells of OOM kills that have not been told of yet.
func (c *container) checkOOM() {
	c.oomMu.Lock()
	defer c.oomMu.Unlock()
	total, err := oomKills(c.dir)
	if err != nil || total <= c.oomKills {
		return
	}
	c.oomKills = total
	c.m.events.add(&agentv1.Event{ContainerId: c.id, Kind: &agentv1.Event_Oom{Oom: &agentv1.OOMKill{Total: total}}})
}

func (c *container) oomTotal() uint64 {
	c.checkOOM()
	c.oomMu.Lock()
	defer c.oomMu.Unlock()
	return c.oomKills
}
