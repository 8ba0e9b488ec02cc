// SPDX-License-Identifier: Apache-2.0

package virtcontainers

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"

	"github.com/google/uuid"

	"github.com/cloister-project/cloister/agent-protocol/wire"
	"github.com/cloister-project/cloister/configs"
	"github.com/cloister-project/cloister/hypervisor"
	"github.com/cloister-project/cloister/hypervisor/qemu"
	"github.com/cloister-project/cloister/tee"
	"github.com/cloister-project/cloister/virtcontainers/network"
)

// hostFacts are what the document depends on beside configuration and pod.
type hostFacts struct {
	arch  hypervisor.Architecture
	accel hypervisor.Accelerator
	cpu   string
	vsock hypervisor.VsockKind
	cid   uint32
	// kernel is the file to boot: the configured one, or what was taken out of it.
	kernel string
}

// buildDocument describes the pod's VM, but for what its platform adds. It is pure: the same input gives the same
// document.
func buildDocument(pod PodConfig, l *launch, nics []network.Interface, host hostFacts) *hypervisor.Document {
	cfg := pod.Config
	size := sizeVM(cfg.Sizing, pod.Resources)
	doc := &hypervisor.Document{
		ID:           pod.ID,
		UUID:         uuid.NewSHA1(uuid.NameSpaceOID, []byte("cloister/"+pod.Namespace+"/"+pod.ID)).String(),
		Architecture: host.arch,
		Accelerator:  host.accel,
		CPU:          hypervisor.CPU{Model: host.cpu, Count: size.vcpus},
		// virtio-fs needs shared memory as well, so that it is shared whichever way vsock goes.
		Memory:    hypervisor.Memory{Bytes: size.memory, Shared: true},
		Boot:      hypervisor.Boot{Kernel: host.kernel, Initrd: cfg.Hypervisor.Initrd, Parameters: kernelParameters(cfg, l.name(), host)},
		Vsock:     hypervisor.Vsock{Kind: host.vsock, CID: host.cid},
		Sandboxed: cfg.Hypervisor.Sandbox,
	}
	if image := cfg.SealedImage(); image != "" {
		doc.Boot = hypervisor.Boot{Kernel: image, Sealed: true}
	}
	if l.apart() == "" {
		doc.SharedFolderPorts = cfg.Sizing.HotplugPorts
	}
	if l.initdata != nil {
		doc.Disks = append(doc.Disks, l.initdata.disk(stateDir(cfg.State.Dir, pod.Namespace, pod.ID)))
	}
	for i, ifc := range nics {
		doc.NICs = append(doc.NICs, hypervisor.NIC{ID: nicID(i), MAC: ifc.MAC.String(), MTU: ifc.MTU})
	}
	return doc
}

// swiotlbSlot is the size of one slot of the kernel's bounce buffers (Linux, include/linux/swiotlb.h: IO_TLB_SHIFT).
const swiotlbSlot = 2 << 10

// kernelParameters are what the driver's machine needs, what Cloister's guest needs, and what the node adds. cgroup v1 is
// not wanted; the CPU's random numbers are credited: an ordinary VM trusts its host anyway, a confidential one its CPU;
// grace periods of RCU are expedited because set-up waits for them and nothing else runs.
//
// They are the same for all pods of a configuration, since a confidential VM's are measured.
func kernelParameters(cfg *configs.Config, name tee.Name, host hostFacts) []string {
	params := append(qemu.KernelParameters(host.arch, host.accel), "cgroup_no_v1=all", "random.trust_cpu=on", "rcupdate.rcu_expedited=1")
	if name.Confidential() {
		// The seed in the boot loader's data comes from the host.
		params = append(params, "random.trust_bootloader=off", wire.ParamTEE+"="+string(name))
		if slots := cfg.TEE.SwiotlbMiB << 20 / swiotlbSlot; slots > 0 {
			p := fmt.Sprintf("swiotlb=%d", slots)
			if name == tee.Sample {
				// Without memory encryption the kernel would not bounce anything, and the path would never be tried.
				p += ",force"
			}
			params = append(params, p)
		}
	}
	if cfg.Log.DebugConsole {
		params = append(params, "loglevel=7", wire.ParamDebug)
	}
	return append(params, cfg.Hypervisor.KernelParams...)
}

// stateDir is the sandbox's own folder: short, since sockets are made in it, and derived from its identity.
func stateDir(root, namespace, id string) string {
	sum := sha256.Sum256([]byte(namespace + "\x00" + id))
	return filepath.Join(root, hex.EncodeToString(sum[:8]))
}

// exists reports whether there is something at path that can be looked at.
func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}
