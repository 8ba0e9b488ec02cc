// SPDX-License-Identifier: Apache-2.0

package virtcontainers

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"sync"
	"time"

	"github.com/containerd/cgroups/v3/cgroup2/stats"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/proto"

	agentv1 "github.com/cloister-project/cloister/agent-protocol/v1"
	"github.com/cloister-project/cloister/agent-protocol/wire"
	"github.com/cloister-project/cloister/virtcontainers/hooks"
)

// Container is one container of a pod.
type Container struct {
	id     string
	bundle string
	spec   *specs.Spec
	pod    *Pod
	init   *Process

	// cleanup takes back what the container holds on the host: disks, shares, layer images. Once the container is made,
	// release runs it.
	cleanup  undo
	released sync.Once
	// poststart are the hooks that run behind the init's start.
	poststart poststart

	mu       sync.Mutex
	extra    map[string]*Process
	paused   bool
	oomKills uint64
}

// ID of the container.
func (c *Container) ID() string { return c.id }

// Bundle is containerd's folder for the container.
func (c *Container) Bundle() string { return c.bundle }

// Init is the container's first process.
func (c *Container) Init() *Process { return c.init }

// Process finds a process by its exec id; the empty id is the init's.
func (c *Container) Process(execID string) (*Process, error) {
	if execID == "" {
		return c.init, nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	p, ok := c.extra[execID]
	if !ok {
		return nil, fmt.Errorf("exec %s in container %s: %w", execID, c.id, errdefs.ErrNotFound)
	}
	return p, nil
}

func (c *Container) execs() []*Process {
	c.mu.Lock()
	defer c.mu.Unlock()
	all := make([]*Process, 0, len(c.extra))
	for _, p := range c.extra {
		all = append(all, p)
	}
	return all
}

func (c *Container) forget(p *Process) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.extra[p.execID] == p {
		delete(c.extra, p.execID)
	}
}

func (c *Container) isPaused() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.paused
}

// noteOOM tells the pod's owner of strikes of the OOM killer that it has not heard of, whichever way they came.
func (c *Container) noteOOM(total uint64) {
	c.mu.Lock()
	news := total > c.oomKills
	if news {
		c.oomKills = total
	}
	c.mu.Unlock()
	if news && c.pod.cfg.OnOOM != nil {
		c.pod.cfg.OnOOM(c.id)
	}
}

// CreateContainer makes a container in a pod that is ready. On an error nothing of it is left, and cfg.IO is closed.
func (p *Pod) CreateContainer(ctx context.Context, cfg ContainerConfig) (_ *Container, err error) {
	ctx, cancel := context.WithTimeout(ctx, p.cfg.Config.Timeouts.CreateContainer)
	defer cancel()
	c := &Container{
		id: cfg.ID, bundle: cfg.Bundle, spec: cfg.Spec, pod: p,
		extra:   map[string]*Process{},
		cleanup: undo{budget: p.cfg.Config.Timeouts.Cleanup},
	}
	c.init = newProcess(c, "", cfg.Stdio, cfg.IO)
	inserted := false
	defer func() {
		if err != nil {
			c.cleanup.run(ctx)
			_ = cfg.IO.Close()
		}
		if inserted {
			p.creates.Done()
		}
	}()
	// The pod's end gives up what is under way.
	defer context.AfterFunc(p.life, cancel)()
	if !wire.ValidID(cfg.ID) {
		return nil, fmt.Errorf("container id %q is not 1 to 128 of [A-Za-z0-9_.-]: %w", cfg.ID, errdefs.ErrInvalidArgument)
	}
	plan, err := planWhole(cfg.Spec, p.cfg, apart(p.cfg.Config))
	if err != nil {
		return nil, fmt.Errorf("container %s: %w", cfg.ID, err)
	}
	g := p.agent()
	if g == nil {
		return nil, p.lostError()
	}
	if err := p.insert(c); err != nil {
		return nil, err
	}
	inserted = true
	c.cleanup.add(func(context.Context) { p.removeContainer(c) })

	req := &agentv1.CreateContainerRequest{ContainerId: c.id, Spec: plan.spec}
	if req.Rootfs, err = p.attachRootfs(ctx, c, cfg.Rootfs); err != nil {
		return nil, fmt.Errorf("root filesystem of container %s: %w", c.id, err)
	}
	if req.Mounts, err = p.attachMounts(ctx, c, plan.mounts); err != nil {
		return nil, fmt.Errorf("mounts of container %s: %w", c.id, err)
	}
	if !cfg.HooksDone {
		if err := p.runCreateHooks(ctx, c); err != nil {
			return nil, err
		}
	}
	conns, stdio, err := g.openStdio(ctx, cfg.Stdio)
	if err != nil {
		return nil, err
	}
	c.cleanup.add(func(context.Context) { conns.close() })
	req.Stdio = stdio
	if _, err := callLong(ctx, g.rpc.CreateContainer, req); err != nil {
		return nil, err
	}
	if ctx.Err() != nil {
		// The caller has gone; the agent has made a container that nobody will delete.
		deleteInGuest(ctx, g, c)
		return nil, ctx.Err()
	}
	// From here on the streams belong to the relays.
	cfg.IO.Attach(conns.stdin, conns.stdout, conns.stderr)
	p.goTracked(c.init.watch)
	return c, nil
}

// planWhole is planContainer with a look at the host's files, so that all that is refused is told at once.
func planWhole(spec *specs.Spec, pod PodConfig, apart string) (*containerPlan, error) {
	plan, err := planContainer(spec, pod, apart)
	look := unshareable
	if apart != "" {
		look = func(m specs.Mount) string { return refusePart(m, apart) }
	}
	if err := withUnshareable(err, spec, look); err != nil {
		return nil, err
	}
	return plan, nil
}

// withUnshareable adds to what the specification alone shows to be impossible what a look at the host's files shows.
func withUnshareable(err error, spec *specs.Spec, look func(specs.Mount) string) error {
	var refused *RefusedError
	if err != nil && !errors.As(err, &refused) {
		return err
	}
	var reasons []string
	if refused != nil {
		reasons = refused.Reasons
	}
	for _, m := range spec.Mounts {
		if isLive(m) && filepath.IsAbs(m.Source) {
			if reason := look(m); reason != "" {
				reasons = append(reasons, reason)
			}
		}
	}
	if len(reasons) == 0 {
		return nil
	}
	return &RefusedError{Reasons: reasons}
}

// deleteInGuest removes a container that its maker does not want after all.
func deleteInGuest(ctx context.Context, g *guest, c *Container) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), g.timeout)
	defer cancel()
	id := c.id
	if _, err := g.rpc.SignalProcess(ctx, &agentv1.SignalProcessRequest{ContainerId: id, Signal: 9, All: true}); err == nil {
		_, _ = g.rpc.WaitProcess(ctx, &agentv1.WaitProcessRequest{ContainerId: id})
	}
	if _, err := g.rpc.DeleteProcess(ctx, &agentv1.DeleteProcessRequest{ContainerId: id}); err != nil {
		log.G(ctx).WithError(err).WithField("container", id).Warn("delete of a cancelled container in the guest")
	}
}

func (p *Pod) runCreateHooks(ctx context.Context, c *Container) error {
	h := c.spec.Hooks
	if h == nil {
		return nil
	}
	if err := hooks.Validate(h); err != nil {
		return err
	}
	state := hookState(c.id, c.bundle, int(p.vmPID()), c.spec.Annotations)
	if err := hooks.CreateRuntime(ctx, h, state); err != nil {
		return err
	}
	c.cleanup.add(func(ctx context.Context) {
		state.Pid = 0
		hooks.Poststop(ctx, h, state)
	})
	return nil
}

// hookState is what hooks read on their standard input; package hooks fills in the status.
func hookState(id, bundle string, pid int, annotations map[string]string) specs.State {
	return specs.State{Version: specs.Version, ID: id, Pid: pid, Bundle: bundle, Annotations: annotations}
}

// Exec adds a further process; it runs from its Start on.
func (c *Container) Exec(ctx context.Context, cfg ExecConfig) (_ *Process, err error) {
	p := newProcess(c, cfg.ID, cfg.Stdio, cfg.IO)
	defer func() {
		if err != nil {
			_ = cfg.IO.Close()
		}
	}()
	if !wire.ValidID(cfg.ID) {
		return nil, fmt.Errorf("exec id %q is not 1 to 128 of [A-Za-z0-9_.-]: %w", cfg.ID, errdefs.ErrInvalidArgument)
	}
	if s := c.init.State().Status; s == ProcessStopped {
		return nil, fmt.Errorf("container %s has stopped: %w", c.id, errdefs.ErrFailedPrecondition)
	}
	g := c.pod.agent()
	if g == nil {
		return nil, c.pod.lostError()
	}
	process, err := json.Marshal(guestProcess(cfg.Process))
	if err != nil {
		return nil, err
	}
	if err := c.reserve(p); err != nil {
		return nil, err
	}
	conns, stdio, err := g.openStdio(ctx, cfg.Stdio)
	if err == nil {
		_, err = call(ctx, g, g.rpc.CreateProcess, &agentv1.CreateProcessRequest{
			ContainerId: c.id, ExecId: cfg.ID, Process: process, Stdio: stdio,
		})
		if err != nil {
			conns.close()
		}
	}
	if err != nil {
		c.forget(p)
		return nil, err
	}
	cfg.IO.Attach(conns.stdin, conns.stdout, conns.stderr)
	return p, nil
}

func (c *Container) reserve(p *Process) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, ok := c.extra[p.execID]; ok {
		return fmt.Errorf("exec %s in container %s: %w", p.execID, c.id, errdefs.ErrAlreadyExists)
	}
	if len(c.extra) >= wire.MaxProcesses {
		return fmt.Errorf("container %s has %d further processes: %w", c.id, len(c.extra), errdefs.ErrResourceExhausted)
	}
	c.extra[p.execID] = p
	return nil
}

// Pause freezes the container's processes.
func (c *Container) Pause(ctx context.Context) error {
	return c.freeze(ctx, true)
}

// Resume lets them run on.
func (c *Container) Resume(ctx context.Context) error {
	return c.freeze(ctx, false)
}

func (c *Container) freeze(ctx context.Context, pause bool) error {
	g := c.pod.agent()
	if g == nil {
		return c.pod.lostError()
	}
	var err error
	if pause {
		_, err = call(ctx, g, g.rpc.PauseContainer, &agentv1.PauseContainerRequest{ContainerId: c.id})
	} else {
		_, err = call(ctx, g, g.rpc.ResumeContainer, &agentv1.ResumeContainerRequest{ContainerId: c.id})
	}
	if err != nil {
		return err
	}
	c.mu.Lock()
	c.paused = pause
	c.mu.Unlock()
	return nil
}

// Update changes the container's resource limits in the guest. Limits above what the VM has are accepted: the VM's own
// size bounds them.
func (c *Container) Update(ctx context.Context, r *specs.LinuxResources) error {
	g := c.pod.agent()
	if g == nil {
		return c.pod.lostError()
	}
	resources, err := json.Marshal(guestResources(r))
	if err != nil {
		return err
	}
	_, err = call(ctx, g, g.rpc.UpdateContainer, &agentv1.UpdateContainerRequest{ContainerId: c.id, Resources: resources})
	return err
}

// Stats reads the container's cgroup in the guest; it works until Delete.
func (c *Container) Stats(ctx context.Context) (*stats.Metrics, error) {
	g := c.pod.agent()
	if g == nil {
		return nil, c.pod.lostError()
	}
	resp, err := call(ctx, g, g.rpc.ContainerStats, &agentv1.ContainerStatsRequest{ContainerId: c.id})
	if err != nil {
		return nil, err
	}
	return decodeStats(resp.GetCgroup2Metrics())
}

func decodeStats(b []byte) (*stats.Metrics, error) {
	m := &stats.Metrics{}
	if err := proto.Unmarshal(b, m); err != nil {
		return nil, fmt.Errorf("the agent's metrics: %w", err)
	}
	return m, nil
}

// Delete removes a container whose init has exited, in the guest and on the host.
func (c *Container) Delete(ctx context.Context) (Exit, error) {
	state := c.init.State()
	if state.Status == ProcessCreated {
		// Never started: it has no exit of its own. End it first.
		if err := c.init.Kill(ctx, 9, true); err != nil && !errdefs.IsNotFound(err) {
			return Exit{}, err
		}
	} else if state.Status != ProcessStopped {
		return Exit{}, fmt.Errorf("container %s is %s: %w", c.id, state.Status, errdefs.ErrFailedPrecondition)
	}
	exit, err := c.init.Wait(ctx)
	if err != nil {
		return Exit{}, err
	}
	if g := c.pod.agent(); g != nil {
		ctx, cancel := context.WithTimeout(ctx, c.pod.cfg.Config.Timeouts.Cleanup)
		_, err := callLong(ctx, g.rpc.DeleteProcess, &agentv1.DeleteProcessRequest{ContainerId: c.id})
		cancel()
		if err != nil && !errdefs.IsNotFound(err) && !errdefs.IsUnavailable(err) {
			return Exit{}, err
		}
	}
	c.settle(ctx)
	c.release(ctx)
	return exit, nil
}

// settle waits until the further processes, which have ended with the container, have delivered their output. Those that
// the guest keeps silent about are ended here.
func (c *Container) settle(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, drainTime)
	defer cancel()
	for _, p := range c.execs() {
		if !p.started() {
			continue
		}
		if _, err := p.Wait(ctx); err != nil {
			p.finish(Exit{Status: statusLost, At: time.Now(), Err: fmt.Errorf("the guest does not report the end of process %s", p.name())}, 0, 0)
		}
	}
}

// release gives back what the container holds on the host. Delete and the pod's end both do it; the first one does the
// work, the other waits for it.
func (c *Container) release(ctx context.Context) {
	c.released.Do(func() {
		c.poststart.end()
		for _, p := range append(c.execs(), c.init) {
			if err := p.io.Close(); err != nil {
				log.G(ctx).WithError(err).WithField("process", p.name()).Debug("close of stdio")
			}
		}
		c.cleanup.run(ctx)
	})
}

// lost ends all processes of the container because the VM is gone.
func (c *Container) lost() {
	var all sync.WaitGroup
	for _, p := range append(c.execs(), c.init) {
		all.Go(p.lost)
	}
	all.Wait()
}

// abandon is lost, and gives back what the container held on the host; the pod is closing.
func (c *Container) abandon(ctx context.Context) {
	c.lost()
	c.release(ctx)
}
