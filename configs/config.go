// SPDX-License-Identifier: Apache-2.0

package configs

import (
	"maps"
	"slices"
	"time"
)

// Config is the whole configuration of one runtime handler, checked and immutable.
type Config struct {
	Hypervisor  Hypervisor
	TEE         TEE
	Sizing      Sizing
	Timeouts    Timeouts
	Rootfs      Rootfs
	Scratch     Scratch
	State       State
	Annotations Annotations
	Log         Log

	// origins tells for each key which layer set it last; whoever checks further names it in their faults.
	origins map[string]origin
}

type origin struct {
	file string
	line int
}

// Hypervisor is [hypervisor]: the VMM, how it runs, and what it boots.
type Hypervisor struct {
	// Kind is one of the Kind constants.
	Kind string
	// Arch is the guest's architecture in Go's words, "amd64" or "s390x"; empty: the host's. Another than the host's is
	// emulated.
	Arch string
	// Path of the VMM's binary; empty: the VMM's driver finds it.
	Path string
	// Accel is one of the Accel constants.
	Accel string
	// CPUModel as the VMM's -cpu takes it; empty: chosen by accelerator.
	CPUModel string
	// Kernel and Initrd are absolute paths of the guest's boot files.
	Kernel string
	Initrd string
	// KernelParams are added at the end of the guest's kernel command line, one parameter each.
	KernelParams []string
	// Vsock is one of the Vsock constants.
	Vsock string
	// Sandbox turns on the VMM's own seccomp filter.
	Sandbox bool
	// Virtiofsd is the path of virtiofsd; empty: found in the usual places. See Config.VirtiofsdPath.
	Virtiofsd string
}

// Values of Hypervisor.Kind, Accel and Vsock.
const (
	KindQEMU            = "qemu"
	KindCloudHypervisor = "cloudhypervisor"

	// AccelAuto takes KVM where the CPU offers hardware virtualization and /dev/kvm opens, else TCG.
	AccelAuto = "auto"
	AccelKVM  = "kvm"
	AccelTCG  = "tcg"

	// VsockAuto takes the embedded vhost-user device, but for a VM whose memory the host cannot read: the kernel's vhost-vsock.
	VsockAuto      = "auto"
	VsockVhost     = "vhost"
	VsockVhostUser = "vhost-user"
)

// TEE is [tee]: whether and how VMs are launched as confidential ones.
type TEE struct {
	// Platform is a name of package tee/abi: none, sample, snp, tdx, se.
	Platform string
	// FirmwareDescriptors are the directories of QEMU's firmware descriptors, the first one with a fitting one counts.
	FirmwareDescriptors []string
	// Initdata is the path of an initdata document for pods without one of their own; empty: none.
	Initdata string
	// InitdataAnnotation is the pod's own initdata as its annotation has it, base64 of gzip; empty: none. It counts in
	// place of Initdata. Only ApplyAnnotations sets it; nothing but its length was checked.
	InitdataAnnotation string
	// AllowDebug accepts launches that let the host read the guest (debug policy, debug attribute).
	AllowDebug bool
	// SwiotlbMiB is the size of the guest's bounce buffers.
	SwiotlbMiB int
	SNP        TEESNP
	TDX        TEETDX
	SE         TEESE
}

// TEESNP is [tee.snp].
type TEESNP struct {
	// Firmware is the path of the firmware; empty: found by FirmwareDescriptors.
	Firmware string
	// FirmwareDigests are the SHA-256 digests (hex) of the firmware images that are accepted: only such as check what they
	// boot. What is right for another platform may be wrong here, so each has a list of its own.
	FirmwareDigests []string
	// Policy of the guest.
	Policy uint64
	// GuestFeatures is the SEV_FEATURES value that the host's kernel puts into each VMSA; it is measured.
	GuestFeatures uint64
	// IDKey and AuthorKey are paths of PEM files with ECDSA P-384 keys; empty: none.
	IDKey, AuthorKey string
	// FamilyID and ImageID are 16 bytes in hex, or empty.
	FamilyID, ImageID string
	GuestSVN          int
}

// TEETDX is [tee.tdx].
type TEETDX struct {
	// Firmware and FirmwareDigests as in TEESNP.
	Firmware        string
	FirmwareDigests []string
	// Attributes of the TD.
	Attributes uint64
	// QuoteSocket is "unix:/path", "vsock:CID:PORT", or empty for none.
	QuoteSocket string
	// MROwner and MROwnerConfig are 48 bytes in hex, or empty.
	MROwner, MROwnerConfig string
}

// TEESE is [tee.se].
type TEESE struct {
	// Image is the path of the Secure Execution image, which holds kernel, initrd and command line.
	Image string
}

// Sizing is [sizing]: how large a VM is.
type Sizing struct {
	// DefaultVCPUs and DefaultMemoryMiB are for a pod that states no limits. DefaultMemoryMiB is the guest's whole
	// memory then, OverheadMemoryMiB is not added.
	DefaultVCPUs     int
	DefaultMemoryMiB int
	// OverheadMemoryMiB is added to the pod's own memory limits for the guest's kernel and agent.
	OverheadMemoryMiB int
	// GrowVCPUs and GrowMemoryMiB are how much more a pod can get while it runs; 0: nothing.
	GrowVCPUs, GrowMemoryMiB int
	// MaxVCPUs and MaxMemoryMiB bound a VM, hotplug included; 0: as much as the host has.
	MaxVCPUs     int
	MaxMemoryMiB int
	// HotplugPorts is the number of PCIe root ports made at boot for shared directories, which come later.
	HotplugPorts int
	// FreePageReporting has an ordinary guest give memory that it does not use back to the host.
	FreePageReporting bool
}

// Timeouts is [timeouts]: how long each step may take before it is given up.
type Timeouts struct {
	// Boot: from the start of the VMM to the agent's ready call.
	Boot time.Duration
	// Stop: from asking the guest to power off until it is killed.
	Stop time.Duration
	// RPC: one call to the agent that is expected to answer at once.
	RPC time.Duration
	// CreateContainer: all of a container's creation, building of missing layer images included.
	CreateContainer time.Duration
	// Hotplug: one device added to or removed from a running guest.
	Hotplug time.Duration
	// Cleanup: undoing a set-up that failed, and deleting from disk state.
	Cleanup time.Duration
}

// Scratch is [scratch]: the disk for what a pod writes.
type Scratch struct {
	// Dir is where the disks' files are, while their pods start.
	Dir string
	// SizeMiB is the size of one; 0: there is none, and what a pod writes is in its guest's memory.
	SizeMiB int
}

// Rootfs is [rootfs]: layer images and the writable layer.
type Rootfs struct {
	// CacheDir holds the EROFS images made of overlayfs layers, shared by all pods of the node.
	CacheDir string
	// CacheMaxMiB bounds it; images in use are never removed. 0: no limit.
	CacheMaxMiB int
	// WritableLayerMaxMiB bounds a container's writable layer in the guest; 0: the scratch disk, or half of the guest's memory.
	WritableLayerMaxMiB int
}

// State is [state].
type State struct {
	// Dir holds the state of running pods; it must not outlive a reboot.
	Dir string
}

// Annotations is [annotations].
type Annotations struct {
	// Allowed lists the keys of pod annotations that have an effect.
	Allowed []string
}

// Log is [log].
type Log struct {
	// Level is trace, debug, info, warn or error. containerd's own level, where it gives one, is the caller's matter.
	Level string
	// DebugConsole makes the guest's kernel and agent write much to the console.
	DebugConsole bool
}

// clone is a deep copy: the receiver is immutable, and the copy is about to be changed.
func (c *Config) clone() *Config {
	n := *c
	n.Hypervisor.KernelParams = slices.Clone(c.Hypervisor.KernelParams)
	n.TEE.FirmwareDescriptors = slices.Clone(c.TEE.FirmwareDescriptors)
	n.TEE.SNP.FirmwareDigests = slices.Clone(c.TEE.SNP.FirmwareDigests)
	n.TEE.TDX.FirmwareDigests = slices.Clone(c.TEE.TDX.FirmwareDigests)
	n.Annotations.Allowed = slices.Clone(c.Annotations.Allowed)
	n.origins = maps.Clone(c.origins)
	return &n
}

// Fault returns a Fault that names the layer which set the key.
func (c *Config) Fault(key, reason, fix string) Fault {
	o := c.origins[key]
	return Fault{File: o.file, Line: o.line, Key: key, Reason: reason, Fix: fix}
}
