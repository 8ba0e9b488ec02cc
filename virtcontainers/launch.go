// SPDX-License-Identifier: Apache-2.0

package virtcontainers

import (
	"context"
	"fmt"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/cloister-project/cloister/agent-protocol/wire"
	"github.com/cloister-project/cloister/configs"
	"github.com/cloister-project/cloister/hypervisor"
	"github.com/cloister-project/cloister/hypervisor/qemu"
	"github.com/cloister-project/cloister/tee"
	"github.com/cloister-project/cloister/tee/platform"
	"github.com/cloister-project/cloister/tee/se"
	"github.com/cloister-project/cloister/tee/snp"
	"github.com/cloister-project/cloister/tee/tdx"
)

// launch is how a pod's VM is launched, as far as configuration and pod tell. It is made by NewPod and never changed.
type launch struct {
	arch     hypervisor.Architecture
	platform tee.Platform
	initdata *podInitdata // nil: none
}

// newLaunch checks what of a pod's configuration concerns its launch. It reads files and looks at no hardware. With a
// RefusedError the launch is given all the same, so that what else is wrong can be told with it.
func newLaunch(cfg PodConfig) (*launch, error) {
	l := &launch{arch: architecture(cfg.Config)}
	var err error
	if l.platform, err = platform.New(cfg.Config); err != nil {
		return nil, err
	}
	if l.initdata, err = loadInitdata(cfg.Config); err != nil {
		return nil, err
	}
	if reasons := refuseLaunch(cfg.Config, l.platform.Name()); reasons != nil {
		return l, &RefusedError{Reasons: reasons}
	}
	return l, nil
}

// refuseLaunch tells what of a configuration would weaken a confidential VM, or hide that there is none.
func refuseLaunch(cfg *configs.Config, name tee.Name) []string {
	var reasons []string
	add := func(format string, a ...any) { reasons = append(reasons, fmt.Sprintf(format, a...)) }
	for _, p := range cfg.Hypervisor.KernelParams {
		// As the agent looks at them: quotes do not make another word of it.
		if strings.Contains(p, wire.ParamTEE) || strings.Contains(p, wire.ParamInitdata) {
			add("hypervisor.kernel_params has %q: the launch alone says this to the guest; remove it", p)
		}
		if key, _, _ := strings.Cut(p, "="); key == wire.ParamDebug && name.Confidential() {
			add("hypervisor.kernel_params has %q with tee.platform = %q: the guest would show the host what it does, and its agent "+
				"refuses to; remove it", p, name)
		}
	}
	if !name.Confidential() {
		if cfg.TEE.InitdataAnnotation != "" || cfg.TEE.Initdata != "" {
			add("initdata is given and tee.platform = %q: nothing binds it to the launch of an ordinary VM; choose a confidential "+
				"platform, or take initdata away", tee.None)
		}
		return reasons
	}
	if cfg.Log.DebugConsole {
		add("log.debug_console with tee.platform = %q: the host would read what the guest writes to its console; set it to false", name)
	}
	if name.Protected() && cfg.Hypervisor.Accel == configs.AccelTCG {
		add("hypervisor.accel = %q with tee.platform = %q: an emulated CPU protects nothing; set it to %q or %q",
			configs.AccelTCG, name, configs.AccelAuto, configs.AccelKVM)
	}
	return reasons
}

// architecture is the guest's.
func architecture(cfg *configs.Config) hypervisor.Architecture {
	return hypervisor.Architecture(cfg.Architecture())
}

// name of the platform.
func (l *launch) name() tee.Name { return l.platform.Name() }

// unpacked tells whether the kernel is started without firmware at its PVH entry, taken out of the configured image. With
// firmware the image is started as it is: its bytes are what is measured.
func (l *launch) unpacked() bool {
	return l.arch == hypervisor.ArchAMD64 && l.name() != tee.SNP && l.name() != tee.TDX
}

// PlanVM gives the document with which Start would launch the pod, prepared by its platform, and the platform. It starts
// and changes nothing. The document has no NICs, since there is no network yet, and any CID; neither is measured. A
// platform with hardware behind it is planned on every machine, whatever that machine lacks: Start probes it.
//
// errdefs.ErrInvalidArgument: configuration or pod ask for what cannot be had. Ordinary and sample VMs need a VMM that
// can be asked for its accelerator; what is wrong with it is the error then.
func PlanVM(ctx context.Context, cfg PodConfig) (*hypervisor.Document, tee.Platform, error) {
	l, err := checkPod(cfg)
	if err != nil {
		return nil, nil, err
	}
	facts := hostFacts{arch: l.arch, accel: hypervisor.AccelKVM, cid: vhostUserCID, kernel: cfg.Config.Hypervisor.Kernel}
	if !l.name().Protected() {
		driver, err := openDriver(ctx, cfg.Config, "")
		if err != nil {
			return nil, nil, err
		}
		if facts.accel, err = driver.Accelerator(cfg.Config.Hypervisor.Accel); err != nil {
			return nil, nil, fmt.Errorf("hypervisor.accel = %q: %w", cfg.Config.Hypervisor.Accel, err)
		}
	}
	facts.cpu = cpuModel(cfg.Config, l, facts.accel)
	facts.vsock = vsockKind(cfg.Config, l.name())
	doc := buildDocument(cfg, l, nil, facts)
	if err := l.platform.Prepare(ctx, doc, l.inputs()); err != nil {
		return nil, nil, err
	}
	return doc, l.platform, nil
}

func (l *launch) inputs() tee.Inputs {
	if l.initdata == nil {
		return tee.Inputs{}
	}
	return tee.Inputs{InitdataDigest: l.initdata.doc.Digest()}
}

// ProbeHost is what a platform's Probe is told of this node: the accelerator that the configuration gives, empty if there
// is none, and what the VMM has, nil if it cannot be asked. It changes nothing.
func ProbeHost(ctx context.Context, cfg *configs.Config) tee.Host {
	driver, err := openDriver(ctx, cfg, "")
	if err != nil {
		return tee.Host{}
	}
	return probedHost(cfg, driver)
}

func probedHost(cfg *configs.Config, driver *qemu.Driver) tee.Host {
	h := tee.Host{VMMTypes: driver.Features().Types}
	if accel, err := driver.Accelerator(cfg.Hypervisor.Accel); err == nil {
		h.Accelerator = accel
	}
	return h
}

// openDriver finds QEMU and what it can do; cacheDir is where that is kept, empty for nowhere.
func openDriver(ctx context.Context, cfg *configs.Config, cacheDir string) (*qemu.Driver, error) {
	path, err := cfg.QEMU()
	if err != nil {
		return nil, err
	}
	driver, err := qemu.New(ctx, qemu.Config{Arch: architecture(cfg), Path: path, CacheDir: cacheDir})
	if err != nil {
		return nil, fmt.Errorf("hypervisor.path: %w", err)
	}
	return driver, nil
}

// snpCPU is the CPU model of SNP VMs where the configuration names none. The model is measured, so that it must not depend
// on the host's CPU; every processor with SNP can run this one.
const snpCPU = "EPYC-v4"

func cpuModel(cfg *configs.Config, l *launch, accel hypervisor.Accelerator) string {
	switch {
	case cfg.Hypervisor.CPUModel != "":
		return cfg.Hypervisor.CPUModel
	case l.name() == tee.SNP:
		return snpCPU
	}
	return qemu.DefaultCPU(l.arch, accel)
}

// vsockKind is the transport. The embedded device maps the guest's memory, of which a protected guest shows little: there
// the kernel's is taken unless another is asked for by name.
func vsockKind(cfg *configs.Config, name tee.Name) hypervisor.VsockKind {
	switch {
	case cfg.Hypervisor.Vsock == configs.VsockVhostUser:
		return hypervisor.VsockVhostUser
	case cfg.Hypervisor.Vsock == configs.VsockVhost, name.Protected(), exists("/dev/vhost-vsock"):
		return hypervisor.VsockVhost
	}
	return hypervisor.VsockVhostUser
}

// qemuCache is where what is known of the VMM's binary is kept.
func qemuCache(cfg *configs.Config) string { return filepath.Join(cfg.Rootfs.CacheDir, "qemu") }

// probe asks the platform whether this host can launch it; the error is a *tee.UnsupportedError then.
func (l *launch) probe(ctx context.Context, h tee.Host) error {
	return tee.Supported(l.name(), l.platform.Probe(ctx, h))
}

// explain finds on the console why the machine did not start the guest, and says what to do; "" if nothing there tells.
func (l *launch) explain(console string) string {
	if l.name() != tee.SE {
		return ""
	}
	return se.ExplainBootError(console)
}

// debugged tells whether the launch lets the host look into the VM (tee.allow_debug).
func debugged(doc *hypervisor.Document) bool {
	c := doc.Confidential
	return c != nil && (c.SNP != nil && snp.Policy(c.SNP.Policy)&snp.PolicyDebug != 0 || c.TDX != nil && c.TDX.Attributes&tdx.AttributeDebug != 0)
}

// describeLaunch is the platform for people, and says what the launch took away from it.
func describeLaunch(name tee.Name, doc *hypervisor.Document) string {
	if debugged(doc) {
		return name.Describe() + ", launched for debugging: NO PROTECTION, the host can read and change this VM's memory"
	}
	return name.Describe()
}

// predicted is the main value of the launch measurement that the document gives, for people; "" where the platform has
// none.
func (l *launch) predicted(ctx context.Context, doc hypervisor.Document) (string, error) {
	if !l.name().Protected() {
		return "", nil
	}
	values, err := l.platform.Measure(ctx, doc)
	if err != nil {
		return "", fmt.Errorf("predict the launch measurement: %w", err)
	}
	if values == nil || len(values.Values) == 0 {
		return "", fmt.Errorf("the platform %s predicts no launch measurement: %w", l.name(), errdefs.ErrInternal)
	}
	v := values.Values[0]
	return fmt.Sprintf("%s=%s (predicted by this host, not what the hardware reported)", v.Name, v.Hex), nil
}
