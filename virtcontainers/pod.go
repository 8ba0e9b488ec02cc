// SPDX-License-Identifier: Apache-2.0

package virtcontainers

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"sync"
	"time"

	"github.com/containerd/cgroups/v3/cgroup2/stats"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/opencontainers/runtime-spec/specs-go"

	agentv1 "github.com/cloister-project/cloister/agent-protocol/v1"
	"github.com/cloister-project/cloister/agent-protocol/wire"
	"github.com/cloister-project/cloister/configs"
	"github.com/cloister-project/cloister/hypervisor"
	"github.com/cloister-project/cloister/virtcontainers/hooks"
	"github.com/cloister-project/cloister/virtcontainers/hostcgroup"
	"github.com/cloister-project/cloister/virtcontainers/network"
	"github.com/cloister-project/cloister/virtcontainers/rootfs"
	"github.com/cloister-project/cloister/virtcontainers/share"
	"github.com/cloister-project/cloister/virtcontainers/vmplan"
	"github.com/cloister-project/cloister/virtcontainers/volumes"
)

// Pod is one pod: a VM, its agent and the containers in it.
type Pod struct {
	cfg      PodConfig
	created  time.Time
	stateDir string
	rootfs   *rootfs.Cache
	disks    disks
	plan     *vmplan.Plan
	// volumes are those that a confidential guest has in place of the host's.
	volumes *volumes.Set

	// shareTurn is held (one element) while share is made; share is written under it and read by its owner, or after
	// all users have gone.
	shareTurn chan struct{}
	share     *share.Share

	// cgroup and vmmPID are written by Start alone, net and doc under mu.
	cgroup *hostcgroup.Group
	vmmPID int
	net    *network.Network
	doc    *hypervisor.Document
	// measured is the launch measurement's predicted main value, under mu.
	measured string

	// life ends when the pod does; tracked goroutines run on it.
	life    context.Context
	endLife context.CancelFunc
	tracked sync.WaitGroup
	// creates are the calls of CreateContainer that have inserted their container; the pod's end waits for them.
	creates sync.WaitGroup

	// ending is closed with the first reason to end, done when everything is released.
	endOnce sync.Once
	ending  chan struct{}
	done    chan struct{}
	cleanup undo

	mu         sync.Mutex
	state      PodState
	starting   bool
	vm         hypervisor.VM
	guest      *guest
	containers map[string]*Container
	exit       Exit
	orderly    bool
	timeline   []timelineMark
}

// timelineMark is a step of the pod's start on the host.
type timelineMark struct {
	name string
	at   time.Time
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
	p := &Pod{
		cfg:        cfg,
		created:    time.Now(),
		stateDir:   plan.StateDir(),
		rootfs:     cache,
		plan:       plan,
		shareTurn:  make(chan struct{}, 1),
		life:       life,
		endLife:    endLife,
		ending:     make(chan struct{}),
		done:       make(chan struct{}),
		cleanup:    undo{budget: cfg.Config.Timeouts.Cleanup},
		state:      PodCreated,
		containers: map[string]*Container{},
	}
	p.volumes = volumes.NewSet(p.putVolume, p.goTracked)
	return p, nil
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
		_, err := planWhole(cfg.Only, cfg, apart(cfg.Config))
		more, other := refusedBy(err)
		if other != nil {
			return nil, other
		}
		reasons = append(reasons, more...)
	}
	switch {
	case len(reasons) > 0:
		for _, f := range faults {
			reasons = append(reasons, f.String())
		}
		return nil, &RefusedError{Reasons: reasons}
	case len(faults) > 0:
		return nil, faults
	}
	return plan, nil
}

// refusedBy takes the reasons out of a RefusedError; any other error it gives back.
func refusedBy(err error) ([]string, error) {
	var refused *RefusedError
	if errors.As(err, &refused) {
		return refused.Reasons, nil
	}
	return nil, err
}

// refuseHost tells what a pod can have of the host only in a container.
func refuseHost(cfg PodConfig) []string {
	var reasons []string
	for _, one := range []struct {
		wanted bool
		reason string
	}{
		{cfg.Network == NetworkHost, "the host's network namespace (hostNetwork): a VM has a network stack of its own"},
		{cfg.HostPID, "the host's pid namespace (hostPID): a VM has processes of its own"},
		{cfg.HostIPC, "the host's ipc namespace (hostIPC): a VM has a kernel of its own"},
	} {
		if one.wanted {
			reasons = append(reasons, one.reason+"; run this pod with another runtime")
		}
	}
	return reasons
}

// Info is a snapshot of the pod.
func (p *Pod) Info() PodInfo {
	p.mu.Lock()
	defer p.mu.Unlock()
	info := PodInfo{ID: p.cfg.ID, State: p.state, CreatedAt: p.created, Extra: map[string]string{}}
	if p.vm != nil {
		info.PID = uint32(p.vm.PID())
	}
	if p.doc != nil {
		info.Extra["hypervisor"] = p.plan.Driver().Kind()
		info.Extra["accelerator"] = string(p.doc.Accelerator)
		info.Extra["vsock"] = string(p.doc.Vsock.Kind)
		info.Extra["vcpus"] = fmt.Sprint(p.doc.CPU.Count)
		info.Extra["memoryMiB"] = fmt.Sprint(p.doc.Memory.Bytes >> 20)
		// Said outright so that nobody takes a VM for a confidential one.
		info.Extra["tee"] = p.plan.Describe(p.doc)
		if digest := p.plan.InitdataDigest(); digest != "" {
			info.Extra["initdata"] = digest
		}
		if p.measured != "" {
			info.Extra["launchMeasurement"] = p.measured
		}
	}
	if p.guest != nil {
		info.Extra["guestKernel"] = printable(p.guest.hello.GetKernelRelease())
		info.Extra["guestBootID"] = printable(p.guest.hello.GetBootId())
		info.Extra["agentVersion"] = printable(p.guest.hello.GetAgentVersion())
	}
	if len(p.timeline) > 0 {
		info.Extra["bootTimeline"] = p.bootTimeline()
	}
	return info
}

// bootTimeline is "name=milliseconds" pairs: the host's steps since the start of the pod, then the guest's since the
// start of its kernel with the prefix "guest:".
func (p *Pod) bootTimeline() string {
	var b strings.Builder
	for _, m := range p.timeline[1:] {
		fmt.Fprintf(&b, "%s=%d ", m.name, m.at.Sub(p.timeline[0].at).Milliseconds())
	}
	if p.guest != nil {
		for _, m := range p.guest.hello.GetBootTimeline() {
			fmt.Fprintf(&b, "guest:%s=%d ", printable(m.GetName()), m.GetMicros()/1000)
		}
	}
	return strings.TrimSpace(b.String())
}

// printable makes a short, harmless word of what a guest says.
func printable(s string) string {
	if len(s) > 128 {
		s = s[:128]
	}
	return strings.Map(func(r rune) rune {
		switch {
		case r == ' ':
			return '-'
		case r < ' ' || r > '~' || r == '=':
			return '?'
		}
		return r
	}, s)
}

func (p *Pod) mark(name string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.timeline = append(p.timeline, timelineMark{name, time.Now()})
}

// agent is the guest's connection while the pod is ready, else nil.
func (p *Pod) agent() *guest {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.state != PodReady {
		return nil
	}
	return p.guest
}

func (p *Pod) machine() hypervisor.VM {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.state != PodReady {
		return nil
	}
	return p.vm
}

func (p *Pod) vmPID() uint32 {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.vm == nil {
		return 0
	}
	return uint32(p.vm.PID())
}

// lostError tells why there is no guest to talk to.
func (p *Pod) lostError() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case p.state == PodCreated:
		return fmt.Errorf("sandbox %s has not been started: %w", p.cfg.ID, errdefs.ErrFailedPrecondition)
	case p.exit.Err != nil:
		// One kind only: whatever ended the pod, for the caller it is not there.
		return fmt.Errorf("sandbox %s has ended: %v: %w", p.cfg.ID, p.exit.Err, errdefs.ErrUnavailable)
	default:
		return fmt.Errorf("sandbox %s has been stopped: %w", p.cfg.ID, errdefs.ErrUnavailable)
	}
}

func (p *Pod) addresses() []netip.Addr {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.net == nil {
		return nil
	}
	var addrs []netip.Addr
	for _, i := range p.net.Interfaces {
		for _, a := range i.Addresses {
			addrs = append(addrs, a.Addr())
		}
	}
	return addrs
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

func (p *Pod) insert(c *Container) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.state != PodReady {
		return fmt.Errorf("sandbox %s is %s: %w", p.cfg.ID, p.state, errdefs.ErrFailedPrecondition)
	}
	if _, ok := p.containers[c.id]; ok {
		return fmt.Errorf("container %s: %w", c.id, errdefs.ErrAlreadyExists)
	}
	if len(p.containers) >= wire.MaxContainers {
		return fmt.Errorf("sandbox %s has %d containers: %w", p.cfg.ID, len(p.containers), errdefs.ErrResourceExhausted)
	}
	p.containers[c.id] = c
	p.creates.Add(1)
	return nil
}

func (p *Pod) removeContainer(c *Container) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.containers[c.id] == c {
		delete(p.containers, c.id)
	}
}

// Ping asks the agent for a sign of life.
func (p *Pod) Ping(ctx context.Context) error {
	g := p.agent()
	if g == nil {
		return p.lostError()
	}
	_, err := call(ctx, g, g.rpc.Ping, &agentv1.PingRequest{})
	return err
}

// Stats sums up the guest.
func (p *Pod) Stats(ctx context.Context) (*stats.Metrics, error) {
	g := p.agent()
	if g == nil {
		return nil, p.lostError()
	}
	resp, err := call(ctx, g, g.rpc.SandboxStats, &agentv1.SandboxStatsRequest{})
	if err != nil {
		return nil, err
	}
	return decodeStats(resp.GetCgroup2Metrics())
}

// Update changes the pod's limits. The VM's size is fixed at its start, so that limits within it are accepted (the
// containers' own cgroups enforce them) and others refused.
func (p *Pod) Update(_ context.Context, r *specs.LinuxResources) error {
	if p.agent() == nil {
		return p.lostError()
	}
	want := vmplan.SizeVM(p.cfg.Config.Sizing, r)
	if want.VCPUs > p.doc.CPU.Count || want.MemoryBytes > p.doc.Memory.Bytes {
		return fmt.Errorf("the pod's new limits need %d CPUs and %d MiB, its VM was started with %d and %d and does not grow: "+
			"make the pod anew: %w", want.VCPUs, want.MemoryBytes>>20, p.doc.CPU.Count, p.doc.Memory.Bytes>>20, errdefs.ErrNotImplemented)
	}
	return nil
}

// Done is closed when the pod has ended and everything that it held is released.
func (p *Pod) Done() <-chan struct{} { return p.done }

// Exit tells how the pod ended; valid after Done.
func (p *Pod) Exit() Exit {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.exit
}

// Stop ends the pod: containers, guest, VMM, and all that it holds on the host. Idempotent; it returns when the pod
// has ended, or ctx has (the end goes on then).
func (p *Pod) Stop(ctx context.Context) error {
	p.mu.Lock()
	if p.starting {
		// Start sees ending and undoes itself; it then comes to the end below.
		p.mu.Unlock()
		p.endOnce.Do(func() { close(p.ending) })
		return p.waitDone(ctx)
	}
	p.mu.Unlock()
	p.end(Exit{At: time.Now()}, true)
	return p.waitDone(ctx)
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
	if p.state == PodStopped {
		p.mu.Unlock()
		return
	}
	p.state = PodStopped
	p.exit, p.orderly = exit, orderly
	vm, g := p.vm, p.guest
	p.mu.Unlock()
	go p.finish(vm, g, orderly)
}

// finish releases everything. It runs once.
func (p *Pod) finish(vm hypervisor.VM, g *guest, orderly bool) {
	ctx := log.WithLogger(context.Background(), log.G(p.life).WithField("sandbox", p.cfg.ID))
	if vm != nil {
		ctx, cancel := context.WithTimeout(ctx, p.cfg.Config.Timeouts.Stop)
		if orderly && g != nil {
			// The guest syncs and powers off; a guest that does not is killed when the time is up.
			if _, err := callLong(ctx, g.rpc.Shutdown, &agentv1.ShutdownRequest{}); err != nil && !errdefs.IsUnavailable(err) {
				log.G(ctx).WithError(err).Warn("the guest does not shut down by itself")
				cancel()
			}
		} else {
			cancel()
		}
		if err := vm.Stop(ctx); err != nil && !errors.Is(err, context.Canceled) {
			log.G(ctx).WithError(err).Warn("stop of the VM")
		}
		cancel()
	}
	p.endLife()
	if g != nil {
		g.close()
	}
	p.creates.Wait()
	var all sync.WaitGroup
	for _, c := range p.Containers() {
		all.Go(func() { c.abandon(ctx) })
	}
	all.Wait()
	p.tracked.Wait()
	p.closeShare(ctx)
	p.cleanup.run(ctx)
	close(p.done)
}
