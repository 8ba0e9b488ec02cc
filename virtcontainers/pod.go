// SPDX-License-Identifier: Apache-2.0

package virtcontainers

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/containerd/cgroups/v3/cgroup2/stats"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/cloister-project/cloister/agent-protocol/wire"
	"github.com/cloister-project/cloister/configs"
	"github.com/cloister-project/cloister/virtcontainers/hooks"
	"github.com/cloister-project/cloister/virtcontainers/mounts"
	"github.com/cloister-project/cloister/virtcontainers/refusal"
	"github.com/cloister-project/cloister/virtcontainers/rootfs"
	"github.com/cloister-project/cloister/virtcontainers/vmplan"
)

// Pod is one pod: a VM, its agent and the containers in it.
type Pod struct {
	// These are fixed by NewPod.
	cfg      PodConfig
	created  time.Time
	stateDir string
	rootfs   *rootfs.Cache
	plan     *vmplan.Plan
	sharing  mounts.Sharing

	// life ends when the pod does; tracked goroutines run on it.
	life    context.Context
	endLife context.CancelFunc
	tracked sync.WaitGroup
	// creates are the calls of CreateContainer that have inserted their container; the pod's end waits for them.
	creates sync.WaitGroup
	// cleanup is filled by Start, and run by the pod's end after it.
	cleanup undo
	// ending is closed with the first reason to end, done when everything is released.
	endOnce sync.Once
	ending  chan struct{}
	done    chan struct{}

	// growing holds one element while the VM is made larger; grown is how large that made it, and belongs to whoever does it.
	growing chan struct{}
	grown   vmplan.Size

	// mu guards what follows.
	mu    sync.Mutex
	state PodState
	// running is set once, when Start has made everything, and nil before; what it points to does not change.
	running    *running
	containers map[string]*Container
	exit       Exit
}

// NewPod checks what can be checked without touching anything.
func NewPod(ctx context.Context, cfg PodConfig) (*Pod, error) {
	plan, err := checkPod(cfg, vmplan.Pod{KeepProbe: true})
	if err != nil {
		return nil, err
	}
	if err := plan.CheckFiles(); err != nil {
		return nil, err
	}
	cache, err := rootfs.OpenCache(cfg.Config.Rootfs.CacheDir, int64(cfg.Config.Rootfs.CacheMaxMiB)<<20)
	if err != nil {
		return nil, err
	}
	life, endLife := context.WithCancel(context.WithoutCancel(ctx))
	return &Pod{
		cfg:      cfg,
		created:  time.Now(),
		stateDir: plan.StateDir(),
		rootfs:   cache,
		plan:     plan,
		sharing:  plan.Sharing(),
		life:     life,
		endLife:  endLife,
		growing:  make(chan struct{}, 1), ending: make(chan struct{}),
		done:       make(chan struct{}),
		cleanup:    undo{budget: cfg.Config.Timeouts.Cleanup},
		state:      PodCreated,
		containers: map[string]*Container{},
	}, nil
}

// checkPod checks what a pod's configuration asks for, its only container's specification included where that is known.
// All that is refused is told at once. The VM's plan is made with what is set in vm beside that.
func checkPod(cfg PodConfig, vm vmplan.Pod) (*vmplan.Plan, error) {
	if !wire.ValidID(cfg.ID) {
		return nil, fmt.Errorf("sandbox id %q is not 1 to 128 of [A-Za-z0-9_.-]: %w", cfg.ID, errdefs.ErrInvalidArgument)
	}
	if err := hooks.Validate(cfg.Hooks); err != nil {
		return nil, err
	}
	reasons := refuseHost(cfg)
	vm.ID, vm.Namespace, vm.Config, vm.Resources = cfg.ID, cfg.Namespace, cfg.Config, cfg.Resources
	plan, err := vmplan.New(vm)
	var faults configs.Faults
	if err != nil && !errors.As(err, &faults) {
		return nil, err
	}
	if cfg.Only != nil {
		_, err := planContainer(cfg.Only, cfg, vmplan.SharingOf(cfg.Config), nil)
		more, other := refusal.Reasons(err)
		if other == nil && cfg.OnlyRootfs != nil {
			other = rootfs.Check(rootfsOf(cfg.Only, cfg.Bundle, cfg.OnlyRootfs))
		}
		if other != nil {
			return nil, other
		}
		reasons = append(reasons, more...)
	}
	if len(reasons) > 0 {
		for _, f := range faults {
			reasons = append(reasons, f.String())
		}
		return nil, refusal.Of(reasons)
	}
	if len(faults) > 0 {
		return nil, faults
	}
	return plan, nil
}

// refuseHost returns what a pod asks of the host and only a container can have.
func refuseHost(cfg PodConfig) []string {
	var reasons []string
	for _, one := range []struct {
		wanted bool
		reason string
	}{
		{cfg.Network == NetworkHost, "hostNetwork: leave it out or use another runtime class: a VM has a network stack of its own"},
		{cfg.HostPID, "hostPID: leave it out or use another runtime class: a VM has processes of its own"},
		{cfg.HostIPC, "hostIPC: leave it out or use another runtime class: a VM has a kernel of its own"},
	} {
		if one.wanted {
			reasons = append(reasons, one.reason)
		}
	}
	for _, key := range slices.Sorted(maps.Keys(cfg.Sysctls)) {
		if scope := wire.ScopeOfSysctl(key); scope != wire.SysctlNetwork && scope != wire.SysctlIPC {
			reasons = append(reasons, fmt.Sprintf("sysctl %s: leave it out: only net.*, kernel.shm*, kernel.msg*, kernel.sem and "+
				"fs.mqueue.* are a pod's own", key))
		}
	}
	return reasons
}

// Info is a snapshot of the pod.
func (p *Pod) Info() PodInfo {
	p.mu.Lock()
	state, r := p.state, p.running
	p.mu.Unlock()
	info := PodInfo{ID: p.cfg.ID, State: state, CreatedAt: p.created, Extra: map[string]string{}}
	if r != nil {
		info.PID = uint32(r.vm.PID())
		info.Extra = r.describe(p.plan)
	}
	return info
}

// vmPID is the VMM's; 0 before Start.
func (p *Pod) vmPID() uint32 {
	p.mu.Lock()
	r := p.running
	p.mu.Unlock()
	if r == nil {
		return 0
	}
	return uint32(r.vm.PID())
}

// moveLocked changes the pod's state. The caller holds mu.
func (p *Pod) moveLocked(to PodState) error {
	if err := checkMove(podMoves, p.state, to); err != nil {
		return fmt.Errorf("sandbox %s: %w", p.cfg.ID, err)
	}
	p.state = to
	return nil
}

// lostError is why there is no guest to talk to.
func (p *Pod) lostError() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.lostLocked()
}

func (p *Pod) lostLocked() error {
	switch {
	case p.state == PodCreated:
		return fmt.Errorf("sandbox %s has not been started: %w", p.cfg.ID, errdefs.ErrFailedPrecondition)
	case p.state == PodStarting:
		return fmt.Errorf("sandbox %s is starting: %w", p.cfg.ID, errdefs.ErrFailedPrecondition)
	case p.exit.Err != nil:
		// One kind only: whatever ended the pod, for the caller it is not there.
		return fmt.Errorf("sandbox %s has ended: %v: %w", p.cfg.ID, p.exit.Err, errdefs.ErrUnavailable)
	default:
		return fmt.Errorf("sandbox %s has been stopped: %w", p.cfg.ID, errdefs.ErrUnavailable)
	}
}

// goTracked runs f on the pod's life; the pod's end waits for it.
func (p *Pod) goTracked(f func(context.Context)) {
	p.tracked.Go(func() { f(p.life) })
}

// Container finds a container.
func (p *Pod) Container(id string) (*Container, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	c, ok := p.containers[id]
	if !ok {
		return nil, fmt.Errorf("container %s in sandbox %s: %w", id, p.cfg.ID, errdefs.ErrNotFound)
	}
	return c, nil
}

// Containers lists the pod's containers.
func (p *Pod) Containers() []*Container {
	p.mu.Lock()
	defer p.mu.Unlock()
	all := make([]*Container, 0, len(p.containers))
	for _, c := range p.containers {
		all = append(all, c)
	}
	return all
}

// insert gives a container its place in a pod that is ready. Whoever inserted one calls creates.Done once it is made, or
// nothing of it is left.
func (p *Pod) insert(c *Container) (*running, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.state != PodReady {
		return nil, p.lostLocked()
	}
	if _, ok := p.containers[c.id]; ok {
		return nil, fmt.Errorf("in sandbox %s: %w", p.cfg.ID, errdefs.ErrAlreadyExists)
	}
	if len(p.containers) >= wire.MaxContainers {
		return nil, fmt.Errorf("sandbox %s has %d containers: %w", p.cfg.ID, len(p.containers), errdefs.ErrResourceExhausted)
	}
	p.containers[c.id] = c
	p.creates.Add(1)
	return p.running, nil
}

func (p *Pod) removeContainer(c *Container) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.containers[c.id] == c {
		delete(p.containers, c.id)
	}
}

// Ping asks the agent for a sign of life.
func (p *Pod) Ping(ctx context.Context) error { return p.agent().Ping(ctx) }

// Stats sums up the guest.
func (p *Pod) Stats(ctx context.Context) (*stats.Metrics, error) { return p.agent().SandboxStats(ctx) }

// StorageUsage asks the guest what its containers have written. No metrics of containerd's have a place for it.
func (p *Pod) StorageUsage(ctx context.Context) (*StorageUsage, error) {
	return p.agent().StorageUsage(ctx)
}

// Update changes the pod's limits: the VM grows where it has room for that. What is less than it has is accepted, the containers' own
// cgroups enforce it. errdefs.ErrOutOfRange: more than there is room for.
func (p *Pod) Update(ctx context.Context, r *specs.LinuxResources) error {
	now, err := p.ready()
	if err != nil {
		return err
	}
	return p.makeRoom(ctx, now, r)
}

// Done is closed when the pod has ended and everything that it held is released.
func (p *Pod) Done() <-chan struct{} { return p.done }

// Exit returns how the pod ended; valid after Done.
func (p *Pod) Exit() Exit {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.exit
}

// Stop ends the pod: containers, guest, VMM, and all that it holds on the host. Idempotent; it returns when the pod
// has ended, or ctx has (the end goes on then).
func (p *Pod) Stop(ctx context.Context) error {
	if !p.interruptStart() {
		p.end(Exit{At: time.Now()}, true)
	}
	return p.waitDone(ctx)
}

// interruptStart makes a Start that is under way undo itself; it then comes to the pod's end. It reports whether there is
// one.
func (p *Pod) interruptStart() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.state != PodStarting {
		return false
	}
	// Start looks at ending under mu before the pod gets ready.
	p.endOnce.Do(func() { close(p.ending) })
	return true
}

func (p *Pod) waitDone(ctx context.Context) error {
	select {
	case <-p.done:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("stop of sandbox %s goes on: %w", p.cfg.ID, ctx.Err())
	}
}

// end begins the pod's end with the first caller's reason; the work runs in a goroutine of its own.
func (p *Pod) end(exit Exit, orderly bool) {
	p.endOnce.Do(func() { close(p.ending) })
	p.mu.Lock()
	if p.moveLocked(PodStopped) != nil {
		p.mu.Unlock()
		return // it has ended
	}
	p.exit = exit
	r := p.running
	p.mu.Unlock()
	go p.finish(r, orderly)
}

// finish releases everything. It runs once.
func (p *Pod) finish(r *running, orderly bool) {
	ctx := log.WithLogger(context.Background(), log.G(p.life).WithField("sandbox", p.cfg.ID))
	if r != nil {
		p.stopVM(ctx, r, orderly)
	}
	p.endLife()
	if r != nil {
		r.guest.Close()
	}
	p.creates.Wait()
	var all sync.WaitGroup
	for _, c := range p.Containers() {
		all.Go(func() { c.abandon(ctx) })
	}
	all.Wait()
	p.tracked.Wait()
	if r != nil {
		r.mounts.Close(ctx)
	}
	p.cleanup.run(ctx)
	close(p.done)
}

// stopVM ends the VM: in order, which the guest has some time for, or at once.
func (p *Pod) stopVM(ctx context.Context, r *running, orderly bool) {
	ctx, cancel := context.WithTimeout(ctx, p.cfg.Config.Timeouts.Stop)
	defer cancel()
	if orderly {
		// The guest syncs and powers off; a guest that does not is killed when the time is up.
		if err := r.guest.Shutdown(ctx); err != nil && !errdefs.IsUnavailable(err) {
			log.G(ctx).WithError(err).Warn("the guest does not shut down by itself")
			cancel()
		}
	} else {
		cancel()
	}
	if err := r.vm.Stop(ctx); err != nil && !errors.Is(err, context.Canceled) {
		log.G(ctx).WithError(err).Warn("stop of the VM")
	}
}
