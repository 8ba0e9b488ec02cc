// SPDX-License-Identifier: Apache-2.0

package virtcontainers

import (
	"context"
	"fmt"
	"path/filepath"
	"sync"
	"time"

	"github.com/containerd/cgroups/v3/cgroup2/stats"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/opencontainers/runtime-spec/specs-go"

	agentv1 "github.com/cloister-project/cloister/agent-protocol/v1"
	"github.com/cloister-project/cloister/agent-protocol/wire"
	"github.com/cloister-project/cloister/virtcontainers/guest"
	"github.com/cloister-project/cloister/virtcontainers/hooks"
	"github.com/cloister-project/cloister/virtcontainers/ocispec"
	"github.com/cloister-project/cloister/virtcontainers/rootfs"
	"github.com/cloister-project/cloister/virtcontainers/standin"
)

// Container is one container of a pod.
type Container struct {
	id     string
	bundle string
	spec   *specs.Spec
	pod    *Pod
	init   *Process
	// terminationLog is the host's file for what the container says of its end; empty if it has none or writes to that itself.
	terminationLog string

	// cleanup takes back what the container holds on the host: disks, shares, layer images. Once the container is made,
	// release runs it.
	cleanup  undo
	released sync.Once
	// poststart are the hooks that run behind the init's start.
	poststart poststart

	mu       sync.Mutex
	extra    map[string]*Process
	oomKills uint64
	// updated are the limits that Update gave the container; nil before the first.
	updated *specs.LinuxResources
	// standIn gives the container its process id on the host. It ends with the init; nil before the container is made.
	standIn *standin.Thread
}

// ID of the container.
func (c *Container) ID() string { return c.id }

// Bundle is containerd's directory for the container.
func (c *Container) Bundle() string { return c.bundle }

// pid stands for the container's processes on the host; 0 before the container is made.
func (c *Container) pid() uint32 {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.standIn == nil {
		return 0
	}
	return uint32(c.standIn.TID())
}

// makeStandIn takes a process id on the host.
func (c *Container) makeStandIn(r *running) error {
	t, err := standin.Start(c.id, r.netns, r.standInRoot)
	if err != nil {
		return err
	}
	c.mu.Lock()
	c.standIn = t
	c.mu.Unlock()
	c.cleanup.add(func(context.Context) { t.Close() })
	return nil
}

// endStandIn gives the process id back; it may be called again, or for a container that has none.
func (c *Container) endStandIn() {
	c.mu.Lock()
	t := c.standIn
	c.mu.Unlock()
	if t != nil {
		t.Close()
	}
}

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

// noteOOM reports to the pod's owner strikes of the OOM killer that it has not heard of, whichever way they came.
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
func (p *Pod) CreateContainer(ctx context.Context, cfg ContainerConfig) (*Container, error) {
	if !wire.ValidID(cfg.ID) {
		_ = cfg.IO.Close()
		return nil, fmt.Errorf("container id %q is not 1 to 128 of [A-Za-z0-9_.-]: %w", cfg.ID, errdefs.ErrInvalidArgument)
	}
	ctx, cancel := context.WithTimeout(ctx, p.cfg.Config.Timeouts.CreateContainer)
	defer cancel()
	// The pod's end gives up what is under way.
	defer context.AfterFunc(p.life, cancel)()
	c, err := p.createContainer(ctx, cfg)
	if err != nil {
		return nil, fmt.Errorf("container %s: %w", cfg.ID, err)
	}
	return c, nil
}

func (p *Pod) createContainer(ctx context.Context, cfg ContainerConfig) (_ *Container, err error) {
	leave := func() {}
	defer func() { leave() }()
	// The pod's end waits for this, too.
	defer func() {
		if err != nil {
			_ = cfg.IO.Close()
		}
	}()
	plan, err := planContainer(cfg.Spec, p.cfg, p.sharing, p)
	if err != nil {
		return nil, err
	}
	c := &Container{
		id: cfg.ID, bundle: cfg.Bundle, spec: cfg.Spec, pod: p, terminationLog: plan.terminationLog(),
		extra:   map[string]*Process{},
		cleanup: undo{budget: p.cfg.Config.Timeouts.Cleanup},
	}
	c.init = newProcess(c, "", cfg.Stdio, cfg.IO)
	r, err := p.insert(c)
	if err != nil {
		return nil, err
	}
	leave = p.creates.Done
	c.cleanup.add(func(context.Context) { p.removeContainer(c) })
	if err := c.create(ctx, r, plan, cfg); err != nil {
		c.cleanup.run(ctx)
		return nil, err
	}
	return c, nil
}

// create makes a container that has its place in the pod. What an error leaves is taken back by cleanup.
func (c *Container) create(ctx context.Context, r *running, plan *containerPlan, cfg ContainerConfig) error {
	ctx = log.WithLogger(ctx, log.G(ctx).WithField("container", c.id))
	req := &agentv1.CreateContainerRequest{ContainerId: c.id, Spec: plan.spec, PidTarget: plan.pidTarget}
	err := c.makeStandIn(r)
	if err != nil {
		return err
	}
	if req.Mounts, err = r.mounts.Attach(ctx, plan.mounts, c.cleanup.add); err != nil {
		return fmt.Errorf("mounts: %w", err)
	}
	root, err := c.resolveRootfs(ctx, cfg.Rootfs)
	if err != nil {
		return err
	}
	writable := uint64(c.pod.cfg.Config.Rootfs.WritableLayerMaxMiB) << 20
	if req.Rootfs, err = r.disks.Attach(ctx, root, writable, c.cleanup.add); err != nil {
		return fmt.Errorf("root filesystem: %w", err)
	}
	if !cfg.HooksDone {
		if err := c.runCreateHooks(ctx); err != nil {
			return err
		}
	}
	var streams *guest.Streams
	if streams, req.Stdio, err = r.guest.OpenStdio(ctx, guest.Stdio(cfg.Stdio)); err != nil {
		return err
	}
	c.cleanup.add(func(context.Context) { streams.Close() })
	if err := c.createInGuest(ctx, r.guest, req); err != nil {
		return err
	}
	// From here on the streams belong to the relays.
	cfg.IO.Attach(streams.Stdin, streams.Stdout, streams.Stderr)
	c.pod.goTracked(c.init.watch)
	return nil
}

// createInGuest has the agent make the container. The agent hears of a deadline, and of nothing else that ends ctx: it is
// heard out, so that what it has made for a caller who has gone can be taken back before its disks are.
func (c *Container) createInGuest(ctx context.Context, g *guest.Client, req *agentv1.CreateContainerRequest) error {
	call := context.WithoutCancel(ctx)
	if deadline, ok := ctx.Deadline(); ok {
		var cancel context.CancelFunc
		call, cancel = context.WithDeadline(call, deadline)
		defer cancel()
	}
	err := g.CreateContainer(call, req)
	gone := ctx.Err()
	if gone == nil {
		gone = c.pod.life.Err() // which ends ctx, a moment later
	}
	if gone == nil || errdefs.IsUnavailable(err) {
		return err
	}
	if discard := g.DiscardContainer(context.WithoutCancel(ctx), c.id); discard != nil && !errdefs.IsNotFound(discard) {
		log.G(ctx).WithError(discard).Warn("delete of a cancelled container in the guest")
	}
	if err == nil {
		err = gone
	}
	return err
}

// rootfsOf returns the mounts of a container's root filesystem: those of the request or, if it has none, the directory of the
// specification's root, which is relative to the bundle.
func rootfsOf(spec *specs.Spec, bundle string, mounts []*types.Mount) []*types.Mount {
	if len(mounts) > 0 || spec.Root == nil || spec.Root.Path == "" {
		return mounts
	}
	path := spec.Root.Path
	if !filepath.IsAbs(path) {
		path = filepath.Join(bundle, path)
	}
	return rootfs.Directory(filepath.Clean(path))
}

// resolveRootfs makes images of the snapshotter's mounts.
func (c *Container) resolveRootfs(ctx context.Context, mounts []*types.Mount) (*rootfs.Rootfs, error) {
	root, err := c.pod.rootfs.Resolve(ctx, rootfsOf(c.spec, c.bundle, mounts))
	if err != nil {
		return nil, err
	}
	c.cleanup.add(func(ctx context.Context) {
		if err := root.Release(); err != nil {
			log.G(ctx).WithError(err).Warn("release layer images")
		}
	})
	if ids := ocispec.IDs(c.spec); !root.IDs.IsZero() && root.IDs != ids {
		return nil, fmt.Errorf("the snapshot is made for %s, and the container's user namespace has %s: %w", root.IDs, ids,
			errdefs.ErrInvalidArgument)
	}
	return root, nil
}

func (c *Container) runCreateHooks(ctx context.Context) error {
	h := c.spec.Hooks
	if h == nil {
		return nil
	}
	if err := hooks.Validate(h); err != nil {
		return err
	}
	state := hookState(c.id, c.bundle, int(c.pid()), c.spec.Annotations)
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
	if err := g.Err(); err != nil {
		return nil, err
	}
	process, err := ocispec.Process(cfg.Process)
	if err != nil {
		return nil, err
	}
	if err := c.reserve(p); err != nil {
		return nil, err
	}
	streams, stdio, err := g.OpenStdio(ctx, guest.Stdio(cfg.Stdio))
	if err == nil {
		// The agent hears of no cancellation: an exec that it has and that is forgotten here would keep its id.
		err = g.CreateProcess(context.WithoutCancel(ctx),
			&agentv1.CreateProcessRequest{ContainerId: c.id, ExecId: cfg.ID, Process: process, Stdio: stdio})
		if err != nil {
			streams.Close()
		}
	}
	if err != nil {
		c.forget(p)
		return nil, err
	}
	cfg.IO.Attach(streams.Stdin, streams.Stdout, streams.Stderr)
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
	if err := c.pod.agent().PauseContainer(ctx, c.id); err != nil {
		return err
	}
	c.moveAll(ProcessRunning, ProcessPaused)
	return nil
}

// Resume lets them run on.
func (c *Container) Resume(ctx context.Context) error {
	if err := c.pod.agent().ResumeContainer(ctx, c.id); err != nil {
		return err
	}
	c.moveAll(ProcessPaused, ProcessRunning)
	return nil
}

// moveAll moves those of the container's processes that are in the first state. Others have ended meanwhile, or were never
// started.
func (c *Container) moveAll(from, to ProcessStatus) {
	for _, p := range append(c.execs(), c.init) {
		_ = p.move(from, to)
	}
}

// Stats reads the container's cgroup in the guest; it works until Delete.
func (c *Container) Stats(ctx context.Context) (*stats.Metrics, error) {
	return c.pod.agent().ContainerStats(ctx, c.id)
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
	if err := c.deleteInGuest(ctx); err != nil && !errdefs.IsNotFound(err) && !errdefs.IsUnavailable(err) {
		return Exit{}, err
	}
	c.settle(ctx)
	c.release(ctx)
	return exit, nil
}

func (c *Container) deleteInGuest(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, c.pod.cfg.Config.Timeouts.Cleanup)
	defer cancel()
	return c.pod.agent().DeleteContainer(ctx, c.id)
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
