// SPDX-License-Identifier: Apache-2.0

package virtcontainers

import (
	"fmt"
	"net/netip"
	"os"
	"strings"
	"time"

	"github.com/containerd/log"

	"github.com/cloister-project/cloister/hypervisor"
	"github.com/cloister-project/cloister/virtcontainers/disks"
	"github.com/cloister-project/cloister/virtcontainers/guest"
	"github.com/cloister-project/cloister/virtcontainers/hostcgroup"
	"github.com/cloister-project/cloister/virtcontainers/mounts"
	"github.com/cloister-project/cloister/virtcontainers/network"
	"github.com/cloister-project/cloister/virtcontainers/portforward"
	"github.com/cloister-project/cloister/virtcontainers/vmplan"
)

// running is what Start made. Start alone fills it in and then publishes it with the pod's state; nobody changes it
// afterwards, so that whoever got it reads it without a lock.
type running struct {
	network *network.Network
	// netns is the pod's network namespace, standInRoot what containers' stand-ins have as their root.
	netns, standInRoot *os.File
	// forward is nil where ports cannot be forwarded.
	forward  *portforward.Forwarder
	cgroup   *hostcgroup.Group
	document *hypervisor.Document
	// measured is the launch measurement's predicted main value.
	measured string
	// vmmPID is known before vm is.
	vmmPID int
	vm     hypervisor.VM
	guest  *guest.Client
	disks  *disks.Set
	mounts *mounts.Set
	// timeline is the steps of the start on the host.
	timeline []timelineMark
}

// timelineMark is a step of the pod's start on the host.
type timelineMark struct {
	name string
	at   time.Time
}

func (r *running) mark(name string) { r.timeline = append(r.timeline, timelineMark{name, time.Now()}) }

// bootTimeline is "name=milliseconds" pairs: the host's steps since the start of the pod, then the guest's since the
// start of its kernel with the prefix "guest:".
func (r *running) bootTimeline() string {
	var b strings.Builder
	for _, m := range r.timeline[1:] {
		fmt.Fprintf(&b, "%s=%d ", m.name, m.at.Sub(r.timeline[0].at).Milliseconds())
	}
	for _, m := range r.guest.Hello().GetBootTimeline() {
		fmt.Fprintf(&b, "guest:%s=%d ", guest.Word(m.GetName()), m.GetMicros()/1000)
	}
	return strings.TrimSpace(b.String())
}

// describe is for people: accelerator, guest kernel, boot timeline and so on.
func (r *running) describe(plan *vmplan.Plan) map[string]string {
	hello := r.guest.Hello()
	extra := map[string]string{
		"hypervisor":  plan.Driver().Kind(),
		"accelerator": string(r.document.Accelerator),
		"vsock":       string(r.document.Vsock.Kind),
		"vcpus":       fmt.Sprint(r.document.CPU.Count),
		"memoryMiB":   fmt.Sprint(r.document.Memory.Bytes >> 20),
		// Said outright so that nobody takes a VM for a confidential one.
		"tee":          plan.Describe(r.document),
		"guestKernel":  guest.Word(hello.GetKernelRelease()),
		"guestBootID":  guest.Word(hello.GetBootId()),
		"agentVersion": guest.Word(hello.GetAgentVersion()),
		"bootTimeline": r.bootTimeline(),
	}
	if digest := plan.InitdataDigest(); digest != "" {
		extra["initdata"] = digest
	}
	if r.measured != "" {
		extra["launchMeasurement"] = r.measured
	}
	return extra
}

func (r *running) addresses() []netip.Addr {
	var addrs []netip.Addr
	for _, i := range r.network.Interfaces {
		for _, a := range i.Addresses {
			addrs = append(addrs, a.Addr())
		}
	}
	return addrs
}

// attachable makes what containers are attached to: the VM's disks, and the pod's mounts.
func (p *Pod) attachable(r *running) {
	cfg := p.cfg.Config
	r.disks = disks.New(r.vm, cfg.Timeouts.Hotplug)
	r.mounts = mounts.New(mounts.Config{
		VM:          r.vm,
		Guest:       r.guest,
		MemoryBytes: r.document.Memory.Bytes,
		Files:       mounts.PodFiles{Hostname: p.cfg.Hostname, Addresses: r.addresses(), DNS: mounts.DNS(p.cfg.DNS)},
		StateDir:    p.stateDir,
		Virtiofsd:   cfg.VirtiofsdPath,
		Adopt:       r.cgroup.AddProcess,
		Run:         p.goTracked,
		Lost:        p.lostGuest,
		Hotplug:     cfg.Timeouts.Hotplug,
		Cleanup:     cfg.Timeouts.Cleanup,
	})
}

// lostGuest ends the pod because its guest is of no use any more.
func (p *Pod) lostGuest(err error) {
	log.G(p.life).WithError(err).WithField("sandbox", p.cfg.ID).Error("the sandbox ends")
	p.end(Exit{Status: statusLost, At: time.Now(), Err: err}, false)
}

// ready returns what Start made while the pod is ready, or why it is not.
func (p *Pod) ready() (*running, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.state != PodReady {
		return nil, p.lostLocked()
	}
	return p.running, nil
}

// agent returns the guest's client. While the pod is not ready it is one whose calls say why.
func (p *Pod) agent() *guest.Client {
	r, err := p.ready()
	if err != nil {
		return guest.Lost(err)
	}
	return r.guest
}
