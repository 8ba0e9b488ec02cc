// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"regexp"

	"github.com/cloister-project/cloister/hypervisor"
	"github.com/cloister-project/cloister/hypervisor/hostcheck"
)

const (
	// maxCPUs keeps APIC ids in 8 bits: no interrupt remapping needed.
	maxCPUs       = 240
	maxNICs       = 8
	maxSharePorts = 32
	// The guest finds a disk by its serial, and a VM's disks by ids spread over maxDisks addresses.
	maxDisks = scsiTargets * scsiLUNs
)

var cpuModelPattern = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_.-]*(,[+-]?[a-z0-9][a-z0-9_.-]*(=[A-Za-z0-9]+)?)*$`)

// Validate implements hypervisor.Driver: what holds for every VMM, and what QEMU's machines have places for.
func (*Driver) Validate(doc hypervisor.Document) error {
	f := doc.Faults()
	if !cpuModelPattern.MatchString(doc.CPU.Model) {
		f.Add("cpu.model %q is no CPU model", doc.CPU.Model)
	}
	if doc.Vsock.Kind == hypervisor.VsockHybrid {
		f.Add("vsock.kind %q: QEMU has no such device", doc.Vsock.Kind)
	}
	if doc.CPU.Count > maxCPUs {
		f.Add("cpu.count %d is more than %d", doc.CPU.Count, maxCPUs)
	}
	if doc.Memory.MaxBytes != 0 && doc.Arch() != hypervisor.ArchAMD64 {
		f.Add("memory.max_bytes is for %s, not for %s", hypervisor.ArchAMD64, doc.Arch())
	}
	if len(doc.Disks) > maxDisks {
		f.Add("%d disks are more than %d", len(doc.Disks), maxDisks)
	}
	if len(doc.NICs) > maxNICs {
		f.Add("%d NICs are more than %d", len(doc.NICs), maxNICs)
	}
	if doc.SharedDirectories > maxSharePorts {
		f.Add("shared_directories %d is more than %d", doc.SharedDirectories, maxSharePorts)
	}
	if doc.SharedDirectories > 0 && doc.Arch() != hypervisor.ArchAMD64 {
		f.Add("shared_directories is for %s, not for %s: there is no place for hot-plugged PCI devices", hypervisor.ArchAMD64, doc.Arch())
	}
	return f.Err()
}

// diskDriver returns QEMU's block driver for the file at path: a regular file or a block device, by what it is.
func diskDriver(path string) (string, error) {
	device, err := hostcheck.Image(path)
	if device {
		return driverDevice, err
	}
	return driverFile, err
}
