// SPDX-License-Identifier: Apache-2.0

package hypervisor

import (
	"fmt"

	"github.com/containerd/errdefs"
)

// Accelerator is what executes the guest's instructions.
type Accelerator string

// Accelerators.
const (
	AccelKVM Accelerator = "kvm"
	AccelTCG Accelerator = "tcg"
)

// AccelAuto asks for KVM where the CPU has hardware virtualization, else for emulation if the VMM has it.
const AccelAuto = "auto"

// Architecture is the guest's instruction set, in Go's words (GOARCH).
type Architecture string

// Architectures.
const (
	ArchAMD64 Architecture = "amd64"
	ArchS390X Architecture = "s390x"
)

// VsockKind says how vsock is carried.
type VsockKind string

// Vsock transports.
const (
	// VsockVhost is the kernel's /dev/vhost-vsock.
	VsockVhost VsockKind = "vhost"
	// VsockVhostUser is the device embedded in this process; it needs Memory.Shared.
	VsockVhostUser VsockKind = "vhost-user"
	// VsockHybrid is the VMM's own device, reached over unix sockets (package vsock/hybrid).
	VsockHybrid VsockKind = "hybrid"
)

// Document describes a VM before it starts. It is pure data.
type Document struct {
	// ID of the sandbox; a safe path element.
	ID string `json:"id"`
	// UUID of the VM, RFC 9562 text form.
	UUID string `json:"uuid"`

	// Architecture of the guest; empty counts as amd64.
	Architecture Architecture `json:"architecture"`
	Accelerator  Accelerator  `json:"accelerator"`
	CPU          CPU          `json:"cpu"`
	Memory       Memory       `json:"memory"`
	Boot         Boot         `json:"boot"`
	Vsock        Vsock        `json:"vsock"`
	// Disks present at boot. More can be added to a running VM.
	Disks []Disk `json:"disks,omitempty"`
	NICs  []NIC  `json:"nics,omitempty"`
	// SharedDirectories is the number of shared directories (virtio-fs) that can be added to the running VM. Needs Memory.Shared.
	SharedDirectories int `json:"shared_directories,omitempty"`
	// Sandboxed asks the VMM to give up what it does not need (seccomp).
	Sandboxed bool `json:"sandboxed"`
	// Confidential says how the VM is launched as a confidential one; nil for an ordinary VM.
	Confidential *Confidential `json:"confidential,omitempty"`
}

// Arch returns the guest's architecture.
func (d Document) Arch() Architecture {
	if d.Architecture == "" {
		return ArchAMD64
	}
	return d.Architecture
}

// CheckGrowth returns errdefs.ErrOutOfRange for more memory than the VM can have while it runs.
func (d Document) CheckGrowth(memoryBytes uint64) error {
	if most := max(d.Memory.Bytes, d.Memory.MaxBytes); memoryBytes > most {
		return fmt.Errorf("%d MiB of memory: the VM can have %d MiB: %w", memoryBytes>>20, most>>20, errdefs.ErrOutOfRange)
	}
	return nil
}

// CPU of the VM.
type CPU struct {
	// Model as the hypervisor names it, "host" or "max" for example.
	Model string `json:"model"`
	// Count of virtual CPUs.
	Count int `json:"count"`
}

// Memory of the VM.
type Memory struct {
	// Bytes of guest RAM; a multiple of 2 MiB.
	Bytes uint64 `json:"bytes"`
	// Shared makes the memory mappable by vhost-user devices.
	Shared bool `json:"shared"`
	// MaxBytes is how much RAM there can be in the running VM (VM.Grow), a multiple of 2 MiB; 0: Bytes. What is not plugged in costs
	// nothing. Only where Driver.Grows, with Shared, and not for a confidential VM.
	MaxBytes uint64 `json:"max_bytes,omitempty"`
	// Reporting lets the guest give memory that it does not use back to the host (virtio-balloon's free page reporting). Not for a
	// confidential VM.
	Reporting bool `json:"reporting,omitempty"`
}

// Boot is direct kernel boot.
type Boot struct {
	// Firmware is the path of a firmware image that the VM starts with; empty: what the VMM brings along.
	Firmware string `json:"firmware,omitempty"`
	// Kernel is the path of a kernel image. amd64: an ELF with a PVH note (without Firmware only) or a bzImage; s390x: a
	// raw kernel image or, with Sealed, a Secure Execution image.
	Kernel string `json:"kernel"`
	// Sealed: Kernel holds initrd and parameters too, so that Initrd and Parameters are empty.
	Sealed bool   `json:"sealed,omitempty"`
	Initrd string `json:"initrd,omitempty"`
	// Parameters of the kernel, in order; none contains white space.
	Parameters []string `json:"parameters,omitempty"`
}

// Vsock device.
type Vsock struct {
	Kind VsockKind `json:"kind"`
	// CID of the guest, at least 3.
	CID uint32 `json:"cid"`
}

// Disk is a raw image or block device of the host.
type Disk struct {
	// ID is unique in the VM: [A-Za-z0-9_-]{1,32}.
	ID string `json:"id"`
	// Path on the host.
	Path string `json:"path"`
	// Serial by which the guest finds the disk: [A-Za-z0-9_-]{1,20}.
	Serial   string `json:"serial"`
	ReadOnly bool   `json:"read_only"`
}

// NIC is a virtio-net device on a tap whose file is handed over at start (Resources.Taps).
type NIC struct {
	// ID is unique in the VM: [A-Za-z0-9_-]{1,32}.
	ID  string `json:"id"`
	MAC string `json:"mac"`
	MTU int    `json:"mtu,omitempty"`
	// VhostNet uses the kernel's vhost-net (Resources.VhostNet).
	VhostNet bool `json:"vhost_net,omitempty"`
}

// SharedDirectory is a virtio-fs device served by a vhost-user daemon.
type SharedDirectory struct {
	// ID is unique in the VM.
	ID string `json:"id"`
	// Tag by which the guest mounts it, at most 36 bytes.
	Tag string `json:"tag"`
	// Socket is the path of the daemon's vhost-user socket.
	Socket string `json:"socket"`
}
