// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/cloister-project/cloister/hypervisor"
	"github.com/cloister-project/cloister/hypervisor/hostcheck"
	"github.com/cloister-project/cloister/hypervisor/qemu/qmp"
	"github.com/cloister-project/cloister/hypervisor/supervise"
	"github.com/cloister-project/cloister/hypervisor/vsock"
	"github.com/cloister-project/cloister/hypervisor/vsock/vhostuser"
)

// Config of a Driver.
type Config struct {
	// Arch of the guests; where empty, the host's.
	Arch hypervisor.Architecture
	// Path of the QEMU binary. Where empty, the usual places are searched.
	Path string
	// CacheDir keeps what is known of the binary; made if missing. Where empty, each Driver probes the binary (0.1 s or so).
	CacheDir string
}

// Kind is QEMU's name in the configuration.
const Kind = "qemu"

// Driver starts VMs with one QEMU binary; hypervisor.Driver.
type Driver struct {
	config Config
	host   hostcheck.KVM
	// turn is held (one element) while the binary is looked for and probed; found is written under it.
	turn  chan struct{}
	found *program
}

// program is a QEMU that was found and probed.
type program struct {
	path     string
	features Features
}

var (
	_ hypervisor.Driver     = (*Driver)(nil)
	_ hypervisor.TableMaker = (*Driver)(nil)
)

// New returns a driver. It touches nothing.
func New(c Config) *Driver {
	if c.Arch == "" {
		c.Arch = hostArchitecture()
	}
	return &Driver{config: c, host: hostcheck.HostKVM(), turn: make(chan struct{}, 1)}
}

// open finds the binary and what it can do, once; a failure is tried again by the next call. Errors: os.ErrNotExist or
// errdefs.ErrNotFound, errdefs.ErrInvalidArgument (not executable, or for another architecture), or what the binary itself
// said if it is no QEMU.
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
	path, err := findBinary(d.config.Path, d.config.Arch)
	if err != nil {
		return nil, err
	}
	f, err := featuresOf(ctx, path, d.config.CacheDir)
	if err != nil {
		return nil, fmt.Errorf("hypervisor.path: %w", err)
	}
	if f.Architecture != d.config.Arch {
		return nil, fmt.Errorf("%s is a QEMU for %s guests and one for %s is needed; correct hypervisor.path or hypervisor.arch: %w",
			path, f.Architecture, d.config.Arch, errdefs.ErrInvalidArgument)
	}
	d.found = &program{path: path, features: f}
	return d.found, nil
}

// Kind implements hypervisor.Driver.
func (*Driver) Kind() string { return Kind }

// VsockKinds implements hypervisor.Driver.
func (*Driver) VsockKinds() []hypervisor.VsockKind {
	return []hypervisor.VsockKind{hypervisor.VsockVhost, hypervisor.VsockVhostUser}
}

// Binary implements hypervisor.Driver.
func (d *Driver) Binary() (string, error) { return findBinary(d.config.Path, d.config.Arch) }

// Capabilities implements hypervisor.Driver.
func (d *Driver) Capabilities(ctx context.Context) (hypervisor.Capabilities, error) {
	b, err := d.open(ctx)
	if err != nil {
		return hypervisor.Capabilities{}, err
	}
	can := hypervisor.Capabilities{
		Binary: b.path, Version: strings.TrimSpace(b.features.Version),
		Details: b.features.details(), Platforms: b.features.platforms(),
	}
	if !b.features.Sandbox {
		can.Sandbox = "this QEMU was built without seccomp (-sandbox)"
	}
	return can, nil
}

// Accelerator implements hypervisor.Driver.
func (d *Driver) Accelerator(ctx context.Context, want string) (hypervisor.Accelerator, error) {
	b, err := d.open(ctx)
	if err != nil {
		return "", err
	}
	return accelerator(want, b.features, d.host)
}

// Start implements hypervisor.Driver.
func (d *Driver) Start(ctx context.Context, doc hypervisor.Document, res hypervisor.Resources) (_ hypervisor.VM, err error) {
	// QEMU gets copies; the transport becomes the VM's.
	defer func() { res.Close() }()
	if err := d.Validate(doc); err != nil {
		return nil, err
	}
	b, err := d.open(ctx)
	if err != nil {
		return nil, err
	}
	drivers, err := preflight(doc, res)
	if err != nil {
		return nil, err
	}
	cmdline, err := newCommandLine(doc, b.features, drivers)
	if err != nil {
		return nil, err
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	v, err := newVM(doc, res.StateDir)
	if err != nil {
		return nil, err
	}
	kernel := res.Vsock
	if kernel != nil {
		v.transport, res.Vsock = kernel, nil
		defer kernel.ReleaseDevice()
	}
	if err := v.start(ctx, b.path, cmdline, res, kernel); err != nil {
		return nil, errors.Join(err, v.discard())
	}
	return v, nil
}

// preflight checks what the document names on the host. It returns the block driver of each disk.
func preflight(doc hypervisor.Document, res hypervisor.Resources) (map[string]string, error) {
	var f hypervisor.Faults
	bootFiles(&f, doc)
	drivers := make(map[string]string, len(doc.Disks))
	for _, disk := range doc.Disks {
		driver, err := diskDriver(disk.Path)
		if err != nil {
			f.Add("disk %s: %w", disk.ID, err)
		}
		drivers[disk.ID] = driver
	}
	hostcheck.Taps(&f, doc, res)
	for _, n := range doc.NICs {
		if n.VhostNet && res.VhostNet[n.ID] == nil {
			f.Add("nic %s: no vhost-net was given", n.ID)
		}
	}
	switch kernel := res.Vsock; {
	case doc.Vsock.Kind != hypervisor.VsockVhost:
		if kernel != nil {
			f.Add("vsock: a transport over the kernel's vhost-vsock was given, and the document asks for %s", doc.Vsock.Kind)
		}
	case kernel == nil:
		f.Add("vsock: no transport over the kernel's vhost-vsock was given")
	case kernel.CID() != doc.Vsock.CID:
		f.Add("vsock: the transport that was given holds context id %d, the document has %d", kernel.CID(), doc.Vsock.CID)
	}
	hostcheck.StateDir(&f, res.StateDir)
	if err := f.Err(); err != nil {
		return nil, err
	}
	return drivers, hostcheck.Memory(doc.Memory.Bytes)
}

// start opens what the VM needs and starts QEMU. On an error the process is gone; the caller calls discard. kernel is nil but
// with the kernel's vsock.
func (v *vm) start(ctx context.Context, path string, cmdline commandLine, res hypervisor.Resources, kernel *vsock.Kernel) error {
	given := map[string]*os.File{}
	for id, f := range res.Taps {
		given[fileTap+id] = f
	}
	for id, f := range res.VhostNet {
		given[fileVhost+id] = f
	}
	// QEMU's ends, closed here once it has its copies.
	var theirs []*os.File
	defer func() { supervise.CloseFiles(theirs) }()
	open := func(name string) (net.Conn, error) {
		conn, file, err := socketPair(name)
		if err == nil {
			theirs = append(theirs, file)
			given[name] = file
		}
		return conn, err
	}
	switch v.doc.Vsock.Kind {
	case hypervisor.VsockVhost:
		given[fileVsock] = kernel.Device()
	case hypervisor.VsockVhostUser:
		dev, err := vhostuser.New(vhostuser.Config{GuestCID: v.doc.Vsock.CID})
		if err != nil {
			return err
		}
		v.transport, v.vsockDevice = dev, dev
		given[fileVsock] = dev.QEMUFile()
		theirs = append(theirs, dev.QEMUFile())
	}
	control, err := open(fileQMP)
	if err != nil {
		return err
	}
	console, err := open(fileConsole)
	if err != nil {
		control.Close()
		return err
	}
	output, stderr, err := os.Pipe()
	if err != nil {
		control.Close()
		console.Close()
		return fmt.Errorf("pipe for QEMU's log: %w", err)
	}
	theirs = append(theirs, stderr)
	files := make([]*os.File, len(cmdline.files))
	for i, name := range cmdline.files {
		files[i] = given[name]
	}
	v.Proc, err = supervise.Start(supervise.Command{
		Name: v.Name, Path: path, Args: cmdline.args, Files: files, Stdout: stderr, Stderr: stderr, NetNS: res.NetNS,
	})
	if err != nil {
		control.Close()
		console.Close()
		output.Close()
		return err
	}
	supervise.CloseFiles(theirs)
	v.Logs.Copy(console, output)

	// From here on, the end of the process ends everything else.
	if res.OnStart != nil {
		if err := res.OnStart(v.PID()); err != nil {
			control.Close()
			v.Abandon(0, v.guestEnd)
			return fmt.Errorf("set up the host's side of QEMU: %w", err)
		}
	}
	client, err := qmp.New(ctx, control, v.onEvent)
	if err != nil {
		grace := supervise.DrainGrace
		if ctx.Err() != nil {
			grace = 0
		}
		if exit, own := v.Abandon(grace, v.guestEnd); own && ctx.Err() == nil {
			err = exit // it says more than a connection that broke
		} else {
			err = fmt.Errorf("%w%s", err, v.QuoteLog())
		}
		return fmt.Errorf("start QEMU: %w", err)
	}
	v.mu.Lock()
	v.qmp = client
	v.mu.Unlock()
	go v.watch()
	return nil
}

// socketPair returns our end and the one that QEMU inherits.
func socketPair(name string) (net.Conn, *os.File, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("socket pair for QEMU's %s: %w", name, err)
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), name), os.NewFile(uintptr(fds[1]), name+" of QEMU")
	conn, err := net.FileConn(ours) // a copy
	ours.Close()
	if err != nil {
		theirs.Close()
		return nil, nil, fmt.Errorf("socket pair for QEMU's %s: %w", name, err)
	}
	return conn, theirs, nil
}
