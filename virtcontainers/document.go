// SPDX-License-Identifier: Apache-2.0

package virtcontainers

import (
	"crypto/sha256"
	"encoding/hex"
	"os"
	"path/filepath"

	"github.com/google/uuid"

	"github.com/cloister-project/cloister/configs"
	"github.com/cloister-project/cloister/hypervisor"
	"github.com/cloister-project/cloister/hypervisor/qemu"
	"github.com/cloister-project/cloister/virtcontainers/network"
)

// hostFacts are what the document depends on beside configuration and pod.
type hostFacts struct {
	accel hypervisor.Accelerator
	cpu   string
	vsock hypervisor.VsockKind
	cid   uint32
}

// buildDocument describes the pod's VM. It is pure: the same input gives the same document.
func buildDocument(cfg *configs.Config, pod PodConfig, kernel string, net *network.Network, host hostFacts) *hypervisor.Document {
	size := sizeVM(cfg.Sizing, pod.Resources)
	doc := &hypervisor.Document{
		ID:          pod.ID,
		UUID:        uuid.NewSHA1(uuid.NameSpaceOID, []byte("cloister/"+pod.Namespace+"/"+pod.ID)).String(),
		Accelerator: host.accel,
		CPU:         hypervisor.CPU{Model: host.cpu, Count: size.vcpus},
		// virtio-fs needs shared memory as well, so that it is shared whichever way vsock goes.
		Memory:            hypervisor.Memory{Bytes: size.memory, Shared: true},
		Boot:              hypervisor.Boot{Kernel: kernel, Initrd: cfg.Hypervisor.Initrd, Parameters: kernelParameters(cfg, host.accel)},
		Vsock:             hypervisor.Vsock{Kind: host.vsock, CID: host.cid},
		SharedFolderPorts: cfg.Sizing.HotplugPorts,
		Sandboxed:         cfg.Hypervisor.Sandbox,
	}
	for i, ifc := range net.Interfaces {
		doc.NICs = append(doc.NICs, hypervisor.NIC{ID: nicID(i), MAC: ifc.MAC.String(), MTU: ifc.MTU})
	}
	return doc
}

// kernelParameters are what the driver's machine needs, what Cloister's guest needs, and what the node adds. cgroup v1 is
// not wanted; the CPU's random numbers are credited, since an ordinary VM trusts its host anyway; grace periods of RCU
// are expedited because set-up waits for them and nothing else runs.
func kernelParameters(cfg *configs.Config, accel hypervisor.Accelerator) []string {
	params := append(qemu.KernelParameters(accel), "cgroup_no_v1=all", "random.trust_cpu=on", "rcupdate.rcu_expedited=1")
	if cfg.Log.DebugConsole {
		params = append(params, "loglevel=7", "cloister.debug")
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
