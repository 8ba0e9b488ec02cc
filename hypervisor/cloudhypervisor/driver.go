// SPDX-License-Identifier: Apache-2.0

package cloudhypervisor

import (
	"context"
	"errors"
	"fmt"
	"runtime"

	"github.com/containerd/errdefs"

	"github.com/cloister-project/cloister/hypervisor"
	"github.com/cloister-project/cloister/hypervisor/hostcheck"
	"github.com/cloister-project/cloister/hypervisor/pvh"
	"github.com/cloister-project/cloister/tee/abi"
)

// Kind is Cloud Hypervisor's name in the configuration.
const Kind = "cloudhypervisor"

// name is Cloud Hypervisor's for people.
const name = "Cloud Hypervisor"

// Config of a Driver.
type Config struct {
	// Arch of the guests; where empty, the host's.
	Arch hypervisor.Architecture
	// Path of the binary. Where empty, the usual places are searched.
	Path string
}

// Driver starts VMs with one Cloud Hypervisor binary; hypervisor.Driver.
type Driver struct {
	config Config
	host   hostcheck.KVM
	// turn is held (one element) while the binary is looked for and asked; found is written under it.
	turn  chan struct{}
	found *program
}

// program is a binary that was found and asked.
type program struct {
	path    string
	version string
}

var _ hypervisor.Driver = (*Driver)(nil)

// New returns a driver. It touches nothing.
func New(c Config) *Driver {
	if c.Arch == "" {
		c.Arch = hypervisor.Architecture(runtime.GOARCH)
	}
	return &Driver{config: c, host: hostcheck.HostKVM(), turn: make(chan struct{}, 1)}
}

// open finds the binary and asks it for its version, once; a failure is tried again by the next call.
func (d *Driver) open(ctx context.Context) (*program, error) {
	select {
	case d.turn <- struct{}{}:
		defer func() { <-d.turn }()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	if d.found != nil {
		return d.found, nil
	}
	path, err := d.Binary()
	if err != nil {
		return nil, err
	}
	version, err := askVersion(ctx, path)
	if err != nil {
		return nil, err
	}
	d.found = &program{path: path, version: version}
	return d.found, nil
}

// Kind implements hypervisor.Driver.
func (*Driver) Kind() string { return Kind }

// VsockKinds implements hypervisor.Driver.
func (*Driver) VsockKinds() []hypervisor.VsockKind {
	return []hypervisor.VsockKind{hypervisor.VsockHybrid}
}

// DefaultCPU implements hypervisor.Driver: there are no models.
func (*Driver) DefaultCPU(hypervisor.Accelerator) string { return "" }

// Grows implements hypervisor.Driver.
func (*Driver) Grows() bool { return false }

// KernelParameters implements hypervisor.Driver.
func (*Driver) KernelParameters(hypervisor.Accelerator) []string {
	return []string{
		"console=ttyS0",
		// Each character on the serial console costs an exit from the guest. A panic is printed all the same.
		"quiet",
		// A panic resets the machine at once, which the event monitor reports.
		"panic=-1",
	}
}

// Binary implements hypervisor.Driver.
func (d *Driver) Binary() (string, error) {
	if d.config.Arch != hypervisor.ArchAMD64 {
		return "", fmt.Errorf("%s runs guests of the architecture %q here, not %q; choose hypervisor.kind = \"qemu\": %w",
			name, hypervisor.ArchAMD64, d.config.Arch, errdefs.ErrNotImplemented)
	}
	return findBinary(d.config.Path)
}

// Capabilities implements hypervisor.Driver. Whether a binary was built for SEV-SNP is asked of the VMM itself, at a start: no
// option tells.
func (d *Driver) Capabilities(ctx context.Context) (hypervisor.Capabilities, error) {
	b, err := d.open(ctx)
	if err != nil {
		return hypervisor.Capabilities{}, err
	}
	can := hypervisor.Capabilities{Binary: b.path, Version: b.version, Platforms: map[abi.Platform]string{abi.SNP: ""}}
	if err := hostcheck.Landlock(); err != nil {
		can.Sandbox = err.Error()
	}
	return can, nil
}

// Accelerator implements hypervisor.Driver.
func (d *Driver) Accelerator(ctx context.Context, want string) (hypervisor.Accelerator, error) {
	if _, err := d.open(ctx); err != nil {
		return "", err
	}
	switch want {
	case hypervisor.AccelAuto, "", string(hypervisor.AccelKVM):
		if err := d.host.Usable(); err != nil {
			return "", fmt.Errorf("%s has KVM only, and KVM cannot be used (hypervisor.kind = \"qemu\" can emulate): %w", name, err)
		}
		return hypervisor.AccelKVM, nil
	case string(hypervisor.AccelTCG):
		return "", fmt.Errorf("%s does not emulate; choose hypervisor.kind = \"qemu\": %w", name, errdefs.ErrNotImplemented)
	}
	return "", fmt.Errorf("accelerator %q is neither auto nor kvm: %w", want, errdefs.ErrInvalidArgument)
}

// Describe implements hypervisor.Driver.
func (d *Driver) Describe(ctx context.Context, doc hypervisor.Document) (hypervisor.Invocation, error) {
	if err := d.Validate(doc); err != nil {
		return hypervisor.Invocation{}, err
	}
	b, err := d.open(ctx)
	if err != nil {
		return hypervisor.Invocation{}, err
	}
	return newInvocation(doc, b.path, "$STATE_DIR")
}

// Start implements hypervisor.Driver.
func (d *Driver) Start(ctx context.Context, doc hypervisor.Document, res hypervisor.Resources) (_ hypervisor.VM, err error) {
	defer res.Close() // the VMM gets copies
	if err := d.Validate(doc); err != nil {
		return nil, err
	}
	b, err := d.open(ctx)
	if err != nil {
		return nil, err
	}
	if err := preflight(doc, res); err != nil {
		return nil, err
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	inv, err := newInvocation(doc, b.path, res.StateDir)
	if err != nil {
		return nil, err
	}
	v, err := newVM(doc, res.StateDir)
	if err != nil {
		return nil, err
	}
	if err := v.start(ctx, inv, res); err != nil {
		return nil, errors.Join(err, v.discard())
	}
	return v, nil
}

// preflight checks what the document names on the host.
func preflight(doc hypervisor.Document, res hypervisor.Resources) error {
	var f hypervisor.Faults
	if snpOf(doc) != nil {
		hostcheck.BootFile(&f, "boot.firmware", doc.Boot.Firmware)
		hostcheck.BootFile(&f, "boot.kernel", doc.Boot.Kernel)
	} else if _, err := pvh.Inspect(doc.Boot.Kernel); err != nil {
		f.Add("boot.kernel: %w", err)
	}
	hostcheck.BootFile(&f, "boot.initrd", doc.Boot.Initrd)
	for _, disk := range doc.Disks {
		if _, err := hostcheck.Image(disk.Path); err != nil {
			f.Add("disk %s: %w", disk.ID, err)
		}
	}
	hostcheck.Taps(&f, doc, res)
	if res.Vsock != nil {
		f.Add("vsock: a transport over the kernel's vhost-vsock was given, and %s has a device of its own", name)
	}
	hostcheck.StateDir(&f, res.StateDir)
	if err := f.Err(); err != nil {
		return err
	}
	if doc.Sandboxed {
		if err := hostcheck.Landlock(); err != nil {
			return fmt.Errorf("hypervisor.sandbox: %w", err)
		}
	}
	return hostcheck.Memory(doc.Memory.Bytes)
}
