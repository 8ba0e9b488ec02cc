// SPDX-License-Identifier: Apache-2.0

package vmplan

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"path/filepath"
	"slices"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/cloister-project/cloister/configs"
	"github.com/cloister-project/cloister/hypervisor"
	"github.com/cloister-project/cloister/hypervisor/vmm"
	"github.com/cloister-project/cloister/tee"
	"github.com/cloister-project/cloister/tee/initdata"
	"github.com/cloister-project/cloister/tee/platform"
	"github.com/cloister-project/cloister/virtcontainers/mounts"
)

// Pod is what a plan is made from.
type Pod struct {
	// ID of the sandbox and its containerd namespace.
	ID, Namespace string
	// Config of the node, the pod's annotations applied.
	Config *configs.Config
	// Resources are the pod's limits, for sizing the VM; may be nil.
	Resources *specs.LinuxResources
	// KeepProbe keeps what is found out about the VMM's binary in the node's cache directory; tools that change nothing do
	// not.
	KeepProbe bool
	// Options of the platform that no configuration has.
	Options platform.Options
}

// Plan is how a pod's VM is launched, as far as configuration and pod tell.
type Plan struct {
	pod      Pod
	cfg      *configs.Config
	arch     hypervisor.Architecture
	driver   hypervisor.Driver
	platform tee.Platform
	initdata *initdata.Document // nil: none
}

// New checks what of a pod concerns its launch. It reads initdata and looks at no hardware. All faults of the settings are
// one error of type configs.Faults.
func New(pod Pod) (*Plan, error) {
	p := &Plan{pod: pod, cfg: pod.Config, arch: hypervisor.Architecture(pod.Config.Architecture())}
	var faults configs.Faults
	var err error
	if p.platform, err = platform.New(p.cfg, pod.Options); err != nil && !errors.As(err, &faults) {
		return nil, err
	}
	for _, f := range platform.LaunchFaults(p.cfg, tee.Name(p.cfg.TEE.Platform)) {
		faults = append(faults, p.cfg.Fault(f.Key, f.Reason, f.Fix))
	}
	if len(faults) > 0 {
		return nil, faults
	}
	if p.driver, err = openDriver(p.cfg, pod.KeepProbe); err != nil {
		return nil, err
	}
	if err := p.checkVsock(); err != nil {
		return nil, err
	}
	if p.initdata, err = loadInitdata(p.cfg); err != nil {
		return nil, err
	}
	return p, nil
}

// checkVsock refuses a vsock device by name that the VMM does not have.
func (p *Plan) checkVsock() error {
	setting := hypervisor.VsockKind(p.cfg.Hypervisor.Vsock)
	if setting == configs.VsockAuto || setting == "" || slices.Contains(p.driver.VsockKinds(), setting) {
		return nil
	}
	return configs.Faults{p.cfg.Fault("hypervisor.vsock", fmt.Sprintf("%q is nothing that hypervisor.kind = %q has", setting, p.driver.Kind()),
		`set it to "auto"`)}
}

// openDriver returns the driver of the configured VMM.
func openDriver(cfg *configs.Config, keep bool) (hypervisor.Driver, error) {
	c := vmm.Config{Kind: cfg.Hypervisor.Kind, Path: cfg.Hypervisor.Path, Arch: hypervisor.Architecture(cfg.Architecture())}
	if keep {
		c.CacheDir = cfg.Rootfs.CacheDir
	}
	return vmm.New(c)
}

// Driver starts the VM.
func (p *Plan) Driver() hypervisor.Driver { return p.driver }

// Platform that the VM is launched on.
func (p *Plan) Platform() tee.Platform { return p.platform }

// Name of the platform.
func (p *Plan) Name() tee.Name { return p.platform.Name() }

// StateDir is the sandbox's own directory: short, since sockets are made in it, and derived from its identity.
func (p *Plan) StateDir() string {
	sum := sha256.Sum256([]byte(p.pod.Namespace + "\x00" + p.pod.ID))
	return filepath.Join(p.cfg.State.Dir, hex.EncodeToString(sum[:8]))
}

// Sharing is what the launch lets the VM share with the host.
func (p *Plan) Sharing() mounts.Sharing { return SharingOf(p.cfg) }

// SharingOf is Sharing for a configuration of which there is no plan, since its settings are at fault.
func SharingOf(cfg *configs.Config) mounts.Sharing {
	return mounts.SharingOf(tee.Name(cfg.TEE.Platform), hypervisor.Architecture(cfg.Architecture()))
}

// CheckFiles looks at the files that every pod needs: the kernel and the initrd, or the sealed image that holds both; what
// the platform reads; and the VMM. The error is of type configs.Faults and names all that are missing, each with its key
// and what to do.
func (p *Plan) CheckFiles() error {
	var faults configs.Faults
	check := func(key, path, fix string) { faults = append(faults, p.cfg.CheckFile(key, path, fix)...) }
	if p.platform.SealedImage() == "" {
		build := "build it with `make guest` or set the key"
		if p.arch == hypervisor.ArchS390X {
			build = "build it with `make guest-s390x` or set the key"
		}
		check("hypervisor.kernel", p.cfg.Hypervisor.Kernel, build)
		check("hypervisor.initrd", p.cfg.Hypervisor.Initrd, build)
	}
	if p.Name().Confidential() && p.cfg.TEE.Initdata != "" {
		check("tee.initdata", p.cfg.TEE.Initdata, "make the file readable, or set the key to \"\"")
	}
	for _, f := range p.platform.Files() {
		if f.Path != "" {
			check(f.Key, f.Path, f.Fix)
		}
	}
	if _, err := p.driver.Binary(); err != nil {
		faults = append(faults, p.cfg.Fault("hypervisor.path", err.Error(), ""))
	}
	if len(faults) == 0 {
		return nil
	}
	return faults
}

// Probe asks the VMM's binary what it can do, and the platform whether this host can launch it; the error is a
// *tee.UnsupportedError if it cannot.
func (p *Plan) Probe(ctx context.Context) error {
	if _, err := p.driver.Capabilities(ctx); err != nil {
		return err
	}
	return tee.Supported(p.Name(), p.Findings(ctx))
}

// Findings is what the platform sees of this host. It changes nothing.
func (p *Plan) Findings(ctx context.Context) []tee.Finding {
	var h tee.Host
	if c, err := p.driver.Capabilities(ctx); err == nil {
		h.VMM = &c
	}
	if accel, err := p.driver.Accelerator(ctx, p.cfg.Hypervisor.Accel); err == nil {
		h.Accelerator = accel
	}
	return p.platform.Probe(ctx, h)
}

// Prepare adds the platform's part to the document, and returns the predicted main value of the launch measurement for
// people; empty where nothing is measured. What cannot be predicted is an error: it is not started.
func (p *Plan) Prepare(ctx context.Context, doc *hypervisor.Document) (measured string, err error) {
	if err := p.platform.Prepare(ctx, doc, p.inputs()); err != nil {
		return "", fmt.Errorf("launch with tee.platform = %q: %w", p.Name(), err)
	}
	return p.predict(ctx, *doc)
}

func (p *Plan) inputs() tee.Inputs {
	if p.initdata == nil {
		return tee.Inputs{}
	}
	return tee.Inputs{InitdataDigest: p.initdata.Digest()}
}

func (p *Plan) predict(ctx context.Context, doc hypervisor.Document) (string, error) {
	if !p.Name().Protected() {
		return "", nil
	}
	values, err := p.platform.Measure(ctx, doc)
	if err != nil {
		return "", fmt.Errorf("predict the launch measurement: %w", err)
	}
	if values == nil || len(values.Values) == 0 {
		return "", fmt.Errorf("the platform %s predicts no launch measurement: %w", p.Name(), errdefs.ErrInternal)
	}
	v := values.Values[0]
	return fmt.Sprintf("%s=%s (predicted by this host, not what the hardware reported)", v.Name, v.Hex), nil
}

// Dry returns the document with which a pod would be started, prepared by its platform. It starts and changes nothing. The
// document has no NICs, since there is no network yet, and any CID; neither is measured. A platform with hardware behind it
// is planned on every machine, whatever that machine lacks: Probe tells. So is KVM.
//
// errdefs.ErrInvalidArgument: configuration or pod ask for what cannot be had. Ordinary and sample VMs need a VMM that
// can be asked for its accelerator; what is wrong with the VMM is the error then.
func (p *Plan) Dry(ctx context.Context) (*hypervisor.Document, error) {
	host := Host{Accelerator: hypervisor.AccelKVM, CID: ownDeviceCID, Kernel: p.cfg.Hypervisor.Kernel, Vsock: p.VsockKind()}
	if !p.Name().Protected() {
		var err error
		switch host.Accelerator, err = p.accelerator(ctx); {
		case errdefs.IsUnavailable(err): // KVM, on a machine without
			host.Accelerator = hypervisor.AccelKVM
		case err != nil:
			return nil, err
		}
	}
	doc := p.Document(nil, host)
	if err := p.platform.Prepare(ctx, doc, p.inputs()); err != nil {
		return nil, err
	}
	return doc, nil
}

// HostCanRead reports whether a prepared document's launch lets the host read the guest although the rules of a
// confidential VM hold.
func (p *Plan) HostCanRead(doc *hypervisor.Document) bool {
	return p.Name().Confidential() && p.platform.HostCanRead(*doc)
}

// Describe is the platform for people, and says what the launch took away from it.
func (p *Plan) Describe(doc *hypervisor.Document) string {
	if p.Name().Protected() && p.platform.HostCanRead(*doc) {
		return p.Name().Describe() + ", launched for debugging: NO PROTECTION, the host can read and change this VM's memory"
	}
	return p.Name().Describe()
}

// Explain says why a VM could not be launched, where its end has words that the platform understands; else it returns the
// error as it is.
func (p *Plan) Explain(err error) error {
	var exit hypervisor.Exit
	if errors.As(err, &exit) {
		if why := p.platform.Explain(exit); why != "" {
			return fmt.Errorf("%s: %w", why, err)
		}
	}
	return err
}
