// SPDX-License-Identifier: Apache-2.0

package virtcontainers

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	agentv1 "github.com/cloister-project/cloister/agent-protocol/v1"
	"github.com/cloister-project/cloister/agent-protocol/wire"
	"github.com/cloister-project/cloister/hypervisor"
	"github.com/cloister-project/cloister/virtcontainers/guest"
	"github.com/cloister-project/cloister/virtcontainers/hooks"
	"github.com/cloister-project/cloister/virtcontainers/hostcgroup"
	"github.com/cloister-project/cloister/virtcontainers/network"
	"github.com/cloister-project/cloister/virtcontainers/portforward"
	"github.com/cloister-project/cloister/virtcontainers/standin"
	"github.com/cloister-project/cloister/virtcontainers/vmplan"
)

// Start boots the VM and returns when its agent is ready. A failed Start leaves nothing; the pod is stopped then.
func (p *Pod) Start(ctx context.Context) error {
	if err := p.beginStart(); err != nil {
		return err
	}
	ctx = log.WithLogger(ctx, log.G(ctx).WithField("sandbox", p.cfg.ID))
	r, err := p.start(ctx)
	if ended := p.endStart(r); err == nil {
		err = ended
	}
	if err != nil {
		p.end(Exit{Status: statusLost, At: time.Now(), Err: err}, false)
		<-p.done
		return err
	}
	info := p.Info()
	ready := log.G(ctx).WithField("timeline", info.Extra["bootTimeline"]).WithField("tee", info.Extra["tee"])
	if p.plan.HostCanRead(r.document) {
		ready.Warn("sandbox ready, with the rules of a confidential VM and NO PROTECTION")
	} else {
		ready.Info("sandbox ready")
	}
	return nil
}

// beginStart keeps a second Start away.
func (p *Pod) beginStart() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.state == PodStopped {
		return p.lostLocked()
	}
	return p.moveLocked(PodStarting)
}

// endStart publishes what Start made and makes the pod ready, unless somebody stopped it meanwhile. r is nil when Start
// has failed; the pod's end comes next then.
func (p *Pod) endStart(r *running) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.running = r
	if r == nil {
		return nil
	}
	select {
	case <-p.ending:
		return fmt.Errorf("sandbox %s was stopped while it started: %w", p.cfg.ID, errdefs.ErrUnavailable)
	default:
	}
	if err := p.moveLocked(PodReady); err != nil {
		return err
	}
	// Begun before anybody can end the pod: its end waits for them.
	p.goTracked(func(ctx context.Context) { p.watchGuest(ctx, r) })
	p.goTracked(func(ctx context.Context) { p.keepClock(ctx, r.guest) })
	if r.forward != nil {
		p.goTracked(func(ctx context.Context) { r.forward.Serve(ctx, r.guest.ForwardPort) })
	}
	go p.watchVM(r.vm)
	return nil
}

// watchVM ends the pod when its VM does. It ends with the VM.
func (p *Pod) watchVM(vm hypervisor.VM) {
	<-vm.Done()
	exit := vm.Exit()
	e := Exit{Status: statusLost, At: time.Now()}
	if exit.Reason != hypervisor.ExitStopped {
		e.Err = exit
		log.G(p.life).WithError(exit).WithField("sandbox", p.cfg.ID).Error("the sandbox's VM is gone")
	}
	p.end(e, false)
}

// connectionGrace is how long the VM may take to be seen as gone after its connection.
const connectionGrace = 5 * time.Second

// watchGuest handles the guest's events. A guest that cannot be talked to any more is of no use: it ends the pod.
func (p *Pod) watchGuest(ctx context.Context, r *running) {
	err := r.guest.WatchEvents(ctx, p.handleEvent)
	if err == nil {
		return
	}
	timer := time.NewTimer(connectionGrace)
	defer timer.Stop()
	select {
	case <-r.vm.Done(): // the cause; its end says more
	case <-ctx.Done():
	case <-timer.C:
		p.lostGuest(err)
	}
}

func (p *Pod) handleEvent(e *agentv1.Event) {
	oom := e.GetOom()
	if oom == nil {
		return
	}
	if c, err := p.Container(e.GetContainerId()); err == nil {
		c.noteOOM(oom.GetTotal())
	}
}

// start does the work of Start. What it made is undone by the pod's end, whether it returns an error or not.
func (p *Pod) start(ctx context.Context) (*running, error) {
	r := &running{}
	r.mark("start")
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stop := make(chan struct{})
	defer close(stop)
	go func() {
		select {
		case <-p.ending:
			cancel()
		case <-stop:
		}
	}()

	// What the host lacks for the platform is told before anything is made.
	if err := p.plan.Probe(ctx); err != nil {
		return nil, err
	}
	if err := p.makeStateDir(r); err != nil {
		return nil, err
	}
	// The kernel is unpacked (once a node) while the network is made.
	var (
		kernel string
		work   errgroup.Group
	)
	work.Go(func() (err error) {
		kernel, err = p.plan.Kernel(ctx)
		return err
	})
	work.Go(func() (err error) {
		r.netns, err = p.makeNetwork(ctx, r)
		return err
	})
	if err := work.Wait(); err != nil {
		return nil, err
	}
	r.mark("prepared")
	host, kernelVsock, err := p.plan.Host(ctx)
	if err != nil {
		return nil, err
	}
	host.Kernel = kernel
	// Measured boot files are hashed meanwhile. What cannot be predicted is not started.
	var last errgroup.Group
	last.Go(func() error { return p.prepareDocument(ctx, r, host) })
	last.Go(func() error { return p.makeCgroup(ctx, r) })
	resources := hypervisor.Resources{Vsock: kernelVsock, NetNS: r.netns, StateDir: p.stateDir}
	if err := last.Wait(); err != nil {
		resources.Close()
		return nil, err
	}
	if err := networkFiles(r.network, &resources, host.VhostNet); err != nil {
		resources.Close()
		return nil, err
	}
	resources.OnStart = func(pid int) error {
		r.vmmPID = pid
		if err := p.saveRecord(r); err != nil {
			return err
		}
		return r.cgroup.AddProcess(ctx, pid)
	}
	r.vm, err = p.plan.Driver().Start(ctx, *r.document, resources)
	if errors.Is(err, unix.ENOSPC) {
		err = fmt.Errorf("the file system of state.dir = %q is full: make room there, or set the key: %w", p.cfg.Config.State.Dir, err)
	}
	if err != nil {
		return nil, p.plan.Explain(err)
	}
	r.mark("vmm")
	if err := p.boot(ctx, r); err != nil {
		r.vm.Kill()
		var refusal *guest.RefusalError
		if errors.As(err, &refusal) {
			// The guest ends itself after it; its own words say more.
		} else if exit := r.vm.Exit(); p.plan.Platform().Explain(exit) != "" || exit.Reason != hypervisor.ExitStopped {
			// The VM's own end says more than the call that failed because of it.
			err = fmt.Errorf("start of the guest: %w", p.plan.Explain(exit))
		} else if errors.Is(err, context.DeadlineExceeded) {
			err = fmt.Errorf("the guest's agent was not ready after %v (timeouts.boot); the last lines of the guest's console:\n%s\n%w",
				p.cfg.Config.Timeouts.Boot, exit.Console, err)
		}
		return nil, err
	}
	// The VMM has it open. Without a name it goes with the VM, whatever ends that.
	if err := removeScratch(p.plan.ScratchFile()); err != nil {
		return nil, err
	}
	p.attachable(r)
	p.forwardPorts(ctx, r)
	return r, nil
}

// forwardPorts listens for `kubectl port-forward`. A pod that cannot have it does without.
func (p *Pod) forwardPorts(ctx context.Context, r *running) {
	if p.plan.Name().Confidential() {
		return // its loopback is not the host's
	}
	f, err := portforward.Listen(ctx, r.netns)
	if err != nil {
		log.G(ctx).WithError(err).Warn("ports of the pod cannot be forwarded")
		return
	}
	r.forward = f
	p.cleanup.add(func(context.Context) { _ = f.Close() })
}

// removeScratch removes the file of a scratch disk; it is no error if there is none.
func removeScratch(path string) error {
	if path == "" {
		return nil
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("remove the file of the scratch disk: %w", err)
	}
	return nil
}

// boot lets the guest run and waits for its agent.
func (p *Pod) boot(ctx context.Context, r *running) error {
	ctx, cancel := context.WithTimeout(ctx, p.cfg.Config.Timeouts.Boot)
	defer cancel()
	// A VM that dies ends the wait at once.
	gone, giveUp := context.WithCancel(ctx)
	defer giveUp()
	go func() {
		select {
		case <-r.vm.Done():
			giveUp()
		case <-gone.Done():
		}
	}()
	ready, err := r.vm.Vsock().Listen(wire.ReadyPort(r.document.Vsock.CID))
	if err != nil {
		return err
	}
	if err := r.vm.Boot(gone); err != nil {
		_ = ready.Close()
		return err
	}
	client, err := guest.Accept(gone, r.vm.Vsock(), ready, p.cfg.Config.Timeouts.RPC, p.plan.CheckHello)
	if err != nil {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		return err
	}
	r.mark("agent")
	if err := client.ConfigureSandbox(gone, p.sandboxRequest(r.network)); err != nil {
		client.Close()
		return fmt.Errorf("configure the guest: %w", err)
	}
	r.mark("ready")
	r.guest = client
	return nil
}

func (p *Pod) sandboxRequest(n *network.Network) *agentv1.ConfigureSandboxRequest {
	scratch := ""
	if p.plan.ScratchFile() != "" {
		scratch = vmplan.ScratchSerial
	}
	return &agentv1.ConfigureSandboxRequest{
		ScratchSerial: scratch,
		SandboxId:     p.cfg.ID,
		Hostname:      p.cfg.Hostname,
		Sysctls:       p.cfg.Sysctls,
		Network:       guestNetwork(n),
		ShmBytes:      p.cfg.ShmBytes,
	}
}

// prepareDocument describes the VM, with what its platform adds, writes initdata's disk, and keeps for Info what the
// launch is predicted to be measured as.
func (p *Pod) prepareDocument(ctx context.Context, r *running, host vmplan.Host) (err error) {
	r.document = p.plan.Document(nics(r.network), host)
	if err := p.plan.WriteInitdata(); err != nil {
		return err
	}
	if err := p.plan.WriteScratch(); err != nil {
		return err
	}
	r.measured, err = p.plan.Prepare(ctx, r.document)
	return err
}

// nics are the pod's interfaces as the VM has them.
func nics(n *network.Network) (all []hypervisor.NIC) {
	for i, ifc := range n.Interfaces {
		all = append(all, hypervisor.NIC{ID: nicID(i), MAC: ifc.MAC.String(), MTU: ifc.MTU})
	}
	return all
}

func (p *Pod) makeStateDir(r *running) error {
	if err := os.MkdirAll(filepath.Dir(p.stateDir), 0o711); err != nil {
		return fmt.Errorf("state directory (state.dir): %w", err)
	}
	if err := os.Mkdir(p.stateDir, 0o700); err != nil {
		if errors.Is(err, os.ErrExist) {
			return fmt.Errorf("the state directory %s of sandbox %s is there already: another shim runs it, or one died and "+
				"`containerd-shim-cloister-v2 delete` has not run: %w", p.stateDir, p.cfg.ID, errdefs.ErrAlreadyExists)
		}
		return fmt.Errorf("state directory (state.dir): %w", err)
	}
	p.cleanup.add(func(ctx context.Context) {
		if err := os.RemoveAll(p.stateDir); err != nil {
			log.G(ctx).WithError(err).Warn("remove the sandbox's state directory")
		}
		if err := removeScratch(p.plan.ScratchFile()); err != nil {
			log.G(ctx).WithError(err).Warn("the pod's scratch disk stays")
		}
		removeRecord(p.cfg.Bundle)
	})
	if err := p.saveRecord(r); err != nil {
		return err
	}
	root, err := standin.OpenRoot(p.stateDir)
	if err != nil {
		return fmt.Errorf("state directory (state.dir): %w", err)
	}
	r.standInRoot = root
	p.cleanup.add(func(context.Context) { _ = root.Close() })
	return nil
}

// makeNetwork opens or makes the pod's network namespace, runs the hooks that fill it, and connects its interfaces to
// taps. The namespace's file stays open until the pod's end.
func (p *Pod) makeNetwork(ctx context.Context, r *running) (*os.File, error) {
	var (
		ns  *os.File
		err error
		pid = os.Getpid()
	)
	switch p.cfg.Network {
	case NetworkPath:
		if ns, err = network.Open(p.cfg.NetNSPath); err != nil {
			return nil, err
		}
		p.cleanup.add(func(context.Context) { _ = ns.Close() })
	default:
		made, err := network.NewNetns()
		if err != nil {
			return nil, err
		}
		p.cleanup.add(func(context.Context) { _ = made.Close() })
		ns, pid = made.File(), made.TID()
	}
	if h := p.cfg.Hooks; h != nil {
		state := hookState(p.cfg.ID, p.cfg.Bundle, pid, p.cfg.Annotations)
		// Poststop runs although a create hook failed half-way: it takes back what the others did.
		p.cleanup.add(func(ctx context.Context) {
			hooks.Poststop(ctx, h, hookState(p.cfg.ID, p.cfg.Bundle, 0, p.cfg.Annotations))
		})
		if err := hooks.CreateRuntime(ctx, h, state); err != nil {
			return nil, err
		}
	}
	attached, err := network.Attach(ctx, ns, p.cfg.ID)
	if err != nil {
		return nil, err
	}
	r.network = attached
	p.cleanup.add(func(ctx context.Context) {
		if err := attached.Close(); err != nil {
			log.G(ctx).WithError(err).Warn("disconnect the pod's network")
		}
	})
	return ns, nil
}

// networkFiles adds duplicates of the taps' files for the driver, which closes what it gets, and vhost-net where it is used.
func networkFiles(n *network.Network, res *hypervisor.Resources, vhostNet bool) error {
	res.Taps, res.VhostNet = map[string]*os.File{}, map[string]*os.File{}
	for i, ifc := range n.Interfaces {
		fd, err := unix.FcntlInt(ifc.Tap.Fd(), unix.F_DUPFD_CLOEXEC, 3)
		if err != nil {
			return fmt.Errorf("duplicate the tap of %s: %w", ifc.HostName, err)
		}
		res.Taps[nicID(i)] = os.NewFile(uintptr(fd), ifc.TapName)
		if vhostNet {
			f, err := vmplan.OpenVhostNet()
			if err != nil {
				return fmt.Errorf("vhost-net for %s: %w", ifc.HostName, err)
			}
			res.VhostNet[nicID(i)] = f
		}
	}
	return nil
}

func (p *Pod) makeCgroup(ctx context.Context, r *running) error {
	path, err := hostcgroup.Path(p.cfg.CgroupsPath, p.cfg.ID)
	if p.cfg.CgroupsPath == "" {
		path, err = hostcgroup.Parent(p.cfg.CgroupParent, p.cfg.ID)
	}
	if err != nil {
		return err
	}
	group, err := hostcgroup.Create(ctx, path)
	if err != nil {
		return fmt.Errorf("host cgroup of the VMM: %w", err)
	}
	r.cgroup = group
	p.cleanup.add(func(ctx context.Context) {
		if err := group.Delete(ctx); err != nil {
			log.G(ctx).WithError(err).Warn("remove the VMM's cgroup")
		}
	})
	return p.saveRecord(r)
}

func nicID(i int) string { return fmt.Sprintf("net%d", i) }

// guestNetwork is what the guest's own stack needs to take the place of the pod's on the host.
func guestNetwork(n *network.Network) *agentv1.Network {
	out := &agentv1.Network{}
	for _, i := range n.Interfaces {
		ifc := &agentv1.Interface{Mac: i.MAC.String(), Name: i.GuestName, Mtu: uint32(i.MTU)}
		for _, a := range i.Addresses {
			ifc.Addresses = append(ifc.Addresses, a.String())
		}
		out.Interfaces = append(out.Interfaces, ifc)
	}
	for _, r := range n.Routes {
		route := &agentv1.Route{
			Device: r.Interface, Scope: uint32(r.Scope), Metric: r.Metric, Mtu: uint32(r.MTU), Onlink: r.OnLink, Family: 4,
		}
		if r.Destination.Addr().Is6() {
			route.Family = 6
		}
		if r.Destination.Bits() > 0 {
			route.Destination = r.Destination.String()
		}
		if r.Gateway.IsValid() {
			route.Gateway = r.Gateway.String()
		}
		if r.Source.IsValid() {
			route.Source = r.Source.String()
		}
		out.Routes = append(out.Routes, route)
	}
	for _, e := range n.Neighbours {
		out.Neighbours = append(out.Neighbours, &agentv1.Neighbour{Address: e.Address.String(), Mac: e.MAC.String(), Device: e.Interface})
	}
	return out
}
