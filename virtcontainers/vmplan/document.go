// SPDX-License-Identifier: Apache-2.0

package vmplan

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"github.com/google/uuid"

	"github.com/cloister-project/cloister/agent-protocol/wire"
	"github.com/cloister-project/cloister/configs"
	"github.com/cloister-project/cloister/hypervisor"
	"github.com/cloister-project/cloister/tee"
)

// Document describes the pod's VM, but for what its platform adds. It is pure: the same input gives the same document.
func (p *Plan) Document(nics []hypervisor.NIC, host Host) *hypervisor.Document {
	size := SizeVM(p.cfg.Sizing, p.pod.Resources)
	doc := &hypervisor.Document{
		ID:           p.pod.ID,
		UUID:         uuid.NewSHA1(uuid.NameSpaceOID, []byte("cloister/"+p.pod.Namespace+"/"+p.pod.ID)).String(),
		Architecture: p.arch,
		Accelerator:  host.Accelerator,
		CPU:          hypervisor.CPU{Model: p.cpuModel(host.Accelerator), Count: size.VCPUs},
		// virtio-fs needs shared memory as well, so that it is shared whichever way vsock goes.
		Memory: hypervisor.Memory{Bytes: size.MemoryBytes, Shared: true,
			Reporting: p.cfg.Sizing.FreePageReporting && !p.Name().Confidential()},
		Boot: hypervisor.Boot{
			Kernel: host.Kernel, Initrd: p.cfg.Hypervisor.Initrd, Parameters: kernelParameters(p.cfg, p.driver, host.Accelerator),
		},
		Vsock:     hypervisor.Vsock{Kind: host.Vsock, CID: host.CID},
		Sandboxed: p.cfg.Hypervisor.Sandbox,
	}
	if !p.Name().Confidential() {
		p.leaveRoom(doc, size)
	}
	if image := p.platform.SealedImage(); image != "" {
		doc.Boot = hypervisor.Boot{Kernel: image, Sealed: true}
	}
	if p.Sharing().Live() {
		doc.SharedDirectories = p.cfg.Sizing.HotplugPorts
	}
	if p.initdata != nil {
		doc.Disks = append(doc.Disks, p.initdataDisk())
	}
	if p.ScratchFile() != "" {
		doc.Disks = append(doc.Disks, p.scratchDisk())
	}
	for _, n := range nics {
		n.VhostNet = host.VhostNet
		doc.NICs = append(doc.NICs, n)
	}
	return doc
}

// cpuModel is the configuration's, the platform's or the VMM's, in this order.
func (p *Plan) cpuModel(accel hypervisor.Accelerator) string {
	return cmp.Or(p.cfg.Hypervisor.CPUModel, p.platform.CPUModel(), p.driver.DefaultCPU(accel))
}

// swiotlbSlot is the size of one slot of the kernel's bounce buffers (Linux, include/linux/swiotlb.h: IO_TLB_SHIFT).
const swiotlbSlot = 2 << 10

// kernelParameters are what the driver's machine needs, what Cloister's guest needs, and what the node adds. cgroup v1 is
// not wanted; the CPU's random numbers are credited: an ordinary VM trusts its host anyway, a confidential one its CPU;
// grace periods of RCU are expedited because set-up waits for them and nothing else runs.
//
// They are the same for all pods of a configuration, since a confidential VM's are measured.
func kernelParameters(cfg *configs.Config, driver hypervisor.Driver, accel hypervisor.Accelerator) []string {
	params := append(driver.KernelParameters(accel), "cgroup_no_v1=all", "random.trust_cpu=on", "rcupdate.rcu_expedited=1")
	if name := tee.Name(cfg.TEE.Platform); name.Confidential() {
		// The seed in the boot loader's data comes from the host.
		params = append(params, "random.trust_bootloader=off", wire.ParamTEE+"="+string(name))
		if slots := cfg.TEE.SwiotlbMiB << 20 / swiotlbSlot; slots > 0 {
			swiotlb := fmt.Sprintf("swiotlb=%d", slots)
			if !name.Protected() {
				// Without memory encryption the kernel would not bounce anything, and the path would never be tried.
				swiotlb += ",force"
			}
			params = append(params, swiotlb)
		}
	}
	if cfg.Log.DebugConsole {
		params = append(params, "loglevel=7", wire.ParamDebug)
	}
	return append(params, cfg.Hypervisor.KernelParams...)
}

// SealedParameters returns the kernel's parameters for an image that is sealed for Secure Execution on any machine: those
// that a node with the built-in configuration gives its other confidential guests. Who seals the image names the platform.
func SealedParameters() ([]string, error) {
	cfg, err := configs.Defaults()
	if err != nil {
		return nil, err
	}
	cfg.Hypervisor.Arch, cfg.TEE.Platform = configs.ArchS390X, string(tee.SE)
	driver, err := openDriver(cfg, false)
	if err != nil {
		return nil, err
	}
	isPlatform := func(p string) bool { return strings.HasPrefix(p, wire.ParamTEE+"=") }
	return slices.DeleteFunc(kernelParameters(cfg, driver, hypervisor.AccelKVM), isPlatform), nil
}
