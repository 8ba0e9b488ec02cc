// SPDX-License-Identifier: Apache-2.0

package cloudhypervisor

import "github.com/cloister-project/cloister/hypervisor"

const (
	// maxCPUs keeps APIC ids in 8 bits: no interrupt remapping needed.
	maxCPUs = 240
	// cpuHost is the only CPU there is.
	cpuHost = "host"
)

// Validate implements hypervisor.Driver: what holds for every VMM, and what Cloud Hypervisor does not do.
func (*Driver) Validate(doc hypervisor.Document) error {
	f := doc.Faults()
	if a := doc.Arch(); a != hypervisor.ArchAMD64 {
		f.Add("architecture %q: Cloud Hypervisor runs %q guests here; choose hypervisor.kind \"qemu\"", a, hypervisor.ArchAMD64)
	}
	if doc.Accelerator != hypervisor.AccelKVM {
		f.Add("accelerator %q: Cloud Hypervisor has %q only, it does not emulate; choose hypervisor.kind \"qemu\"",
			doc.Accelerator, hypervisor.AccelKVM)
	}
	if m := doc.CPU.Model; m != "" && m != cpuHost {
		f.Add("cpu.model %q: Cloud Hypervisor has no CPU models, the guest gets the host's; leave it empty", m)
	}
	if doc.CPU.Count > maxCPUs {
		f.Add("cpu.count %d is more than %d", doc.CPU.Count, maxCPUs)
	}
	if doc.Memory.MaxBytes != 0 {
		f.Add("memory.max_bytes: VMs of Cloud Hypervisor do not grow here; choose hypervisor.kind \"qemu\"")
	}
	if doc.Boot.Firmware != "" && snpOf(doc) == nil {
		f.Add("boot.firmware: Cloud Hypervisor boots the kernel directly; leave it empty")
	}
	if doc.Vsock.Kind != hypervisor.VsockHybrid {
		f.Add("vsock.kind %q: Cloud Hypervisor has its own device, %q", doc.Vsock.Kind, hypervisor.VsockHybrid)
	}
	for _, n := range doc.NICs {
		if n.VhostNet {
			f.Add("nic %s: Cloud Hypervisor does not use the kernel's vhost-net", n.ID)
		}
	}
	if len(doc.Disks) > maxDisks {
		f.Add("%d disks are more than %d", len(doc.Disks), maxDisks)
	}
	if n := len(doc.NICs) + doc.SharedDirectories; n > maxOthers {
		f.Add("%d NICs and shared directories are more than the %d that have a place on the PCI bus", n, maxOthers)
	}
	if doc.Confidential != nil {
		f = append(f, confidential(*doc.Confidential)...)
	}
	return f.Err()
}

// confidential refuses every confidential VM but SEV-SNP's, with its reason.
func confidential(c hypervisor.Confidential) (f hypervisor.Faults) {
	switch {
	case c.SNP != nil && c.SNP.IDBlock != nil:
		f.Add("confidential.snp.id_block: Cloud Hypervisor takes ID blocks from IGVM files only; leave out tee.snp.id_key, or choose " +
			"hypervisor.kind \"qemu\"")
	case c.SNP != nil:
	case c.TDX != nil:
		f.Add("platform %q: Cloud Hypervisor speaks the interface that KVM had before TDX was merged into Linux, and gives the "+
			"guest no quotes; choose hypervisor.kind \"qemu\"", c.Platform)
	case c.SecureExecution:
		f.Add("platform %q: Cloud Hypervisor does not run on IBM Z; choose hypervisor.kind \"qemu\"", c.Platform)
	default:
		f.Add("platform %q: Cloud Hypervisor gives virtio devices the DMA rules of a confidential guest only where hardware "+
			"protects it; choose hypervisor.kind \"qemu\"", c.Platform)
	}
	return f
}
