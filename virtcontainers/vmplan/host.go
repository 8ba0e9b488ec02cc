// SPDX-License-Identifier: Apache-2.0

package vmplan

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/cloister-project/cloister/agent-protocol/wire"
	"github.com/cloister-project/cloister/configs"
	"github.com/cloister-project/cloister/hypervisor"
	"github.com/cloister-project/cloister/hypervisor/pvh"
	"github.com/cloister-project/cloister/hypervisor/vsock"
)

// ownDeviceCID is the guest's CID on the embedded device and on the VMM's own: every guest has a device of its own there, so
// that it need not be unique.
const ownDeviceCID = 3

// Devices of the kernel that carry a VM's vsock and network.
const (
	VhostVsockDevice = "/dev/vhost-vsock"
	vhostNetDevice   = "/dev/vhost-net"
)

// Host is what the document depends on beside configuration and pod.
type Host struct {
	Accelerator hypervisor.Accelerator
	Vsock       hypervisor.VsockKind
	CID         uint32
	// Kernel is the file to boot: the configured one, or what was taken out of it (Kernel).
	Kernel string
	// VhostNet: the network interfaces use the kernel's vhost-net.
	VhostNet bool
}

// Host finds out what the document leaves to the host, but for the guest's kernel. With the kernel's vsock the transport that
// holds the CID, and the port where the agent reports, come with it; the caller closes it.
func (p *Plan) Host(ctx context.Context) (Host, *vsock.Kernel, error) {
	accel, err := p.accelerator(ctx)
	if err != nil {
		// What the VMM runs on no machine is told before what this one lacks.
		if doc, dry := p.Dry(ctx); dry == nil {
			if refused := p.driver.Validate(*doc); refused != nil {
				err = refused
			}
		}
		return Host{}, nil, err
	}
	h := Host{Accelerator: accel, Vsock: p.VsockKind(), CID: ownDeviceCID, VhostNet: usesVhostNet(accel, vhostNetDevice)}
	if h.Vsock != hypervisor.VsockVhost {
		return h, nil, nil
	}
	kernel, err := vsock.NewKernel(ctx, wire.ReadyPort)
	if err != nil {
		return Host{}, nil, fmt.Errorf("hypervisor.vsock = %q: %w", p.cfg.Hypervisor.Vsock, err)
	}
	h.CID = kernel.CID()
	return h, kernel, nil
}

func (p *Plan) accelerator(ctx context.Context) (hypervisor.Accelerator, error) {
	if _, err := p.driver.Capabilities(ctx); err != nil {
		return "", err // the binary's fault, not the setting's
	}
	accel, err := p.driver.Accelerator(ctx, p.cfg.Hypervisor.Accel)
	if err != nil {
		return "", fmt.Errorf("hypervisor.accel = %q: %w", p.cfg.Hypervisor.Accel, err)
	}
	return accel, nil
}

// VsockKind is the transport. Unless another is asked for by name it is the embedded device, which is as fast as the kernel's
// (docs/performance.md) and has no address that others could reach. It maps the guest's memory, though, of which a protected
// guest shows little: there the kernel's is taken.
func (p *Plan) VsockKind() hypervisor.VsockKind {
	if kinds := p.driver.VsockKinds(); len(kinds) == 1 {
		return kinds[0]
	}
	switch setting := p.cfg.Hypervisor.Vsock; {
	case setting == configs.VsockVhostUser:
		return hypervisor.VsockVhostUser
	case setting == configs.VsockVhost, p.Name().Protected():
		return hypervisor.VsockVhost
	}
	return hypervisor.VsockVhostUser
}

// usesVhostNet reports whether network interfaces use the kernel's vhost-net: with KVM, where the device is there and can be
// opened. Under emulation it gains nothing, and a node without it works as well, only slower.
func usesVhostNet(accel hypervisor.Accelerator, device string) bool {
	if accel != hypervisor.AccelKVM {
		return false
	}
	f, err := openVhostNet(device)
	if err != nil {
		return false
	}
	_ = f.Close()
	return true
}

// OpenVhostNet opens the kernel's vhost-net for one network interface. The caller closes it.
func OpenVhostNet() (*os.File, error) { return openVhostNet(vhostNetDevice) }

func openVhostNet(device string) (*os.File, error) {
	return os.OpenFile(device, os.O_RDWR|unix.O_CLOEXEC, 0)
}

// Kernel returns the kernel to boot. Where the platform does not need the configured file as it is, it is uncompressed,
// which boots faster: taken out of the configured one once a node and kept in its cache.
func (p *Plan) Kernel(ctx context.Context) (string, error) {
	if !p.unpacksKernel() {
		return p.cfg.Hypervisor.Kernel, nil
	}
	image, err := pvh.Extract(ctx, p.cfg.Hypervisor.Kernel, filepath.Join(p.cfg.Rootfs.CacheDir, "kernels"))
	if err != nil {
		return "", fmt.Errorf("unpack the guest's kernel (hypervisor.kernel) into rootfs.cache_dir = %q: %w", p.cfg.Rootfs.CacheDir, err)
	}
	return image, nil
}

// unpacksKernel reports whether the kernel is started without firmware at its PVH entry, which exists on amd64.
func (p *Plan) unpacksKernel() bool {
	return p.arch == hypervisor.ArchAMD64 && !p.platform.BootsKernelFile()
}
