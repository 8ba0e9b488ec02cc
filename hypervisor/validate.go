// SPDX-License-Identifier: Apache-2.0

package hypervisor

import (
	"net"
	"path/filepath"
	"regexp"
	"strings"
	"unicode"

	"github.com/google/uuid"
)

const (
	memoryStep = 2 << 20
	minMemory  = 64 << 20
	// maxCommandLine is COMMAND_LINE_SIZE of x86 Linux less the final NUL. What an s390x kernel takes is in its header.
	maxCommandLine = 2047
	maxTag         = 36 // VIRTIO_FS tag field
)

var (
	sandboxIDPattern = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_.-]{0,127}$`)
	deviceIDPattern  = regexp.MustCompile(`^[A-Za-z0-9_-]{1,32}$`)
	serialPattern    = regexp.MustCompile(`^[A-Za-z0-9_-]{1,20}$`)
)

// Validate checks everything about a document that holds for every VMM and can be told without touching the host. What
// would leave a confidential guest without the protection that its description promises is among it. The error wraps
// errdefs.ErrInvalidArgument and names every fault.
func (d Document) Validate() error {
	f := d.Faults()
	return f.Err()
}

// Faults is Validate for drivers, which add their own.
func (d Document) Faults() Faults {
	var f Faults
	if !sandboxIDPattern.MatchString(d.ID) {
		f.Add("id %q is no safe path element of 1 to 128 letters, digits, '_', '.', '-'", d.ID)
	}
	if _, err := uuid.Parse(d.UUID); err != nil || len(d.UUID) != 36 {
		f.Add("uuid %q is not of the form xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx", d.UUID)
	}
	if d.Accelerator != AccelKVM && d.Accelerator != AccelTCG {
		f.Add("accelerator %q is neither %q nor %q", d.Accelerator, AccelKVM, AccelTCG)
	}
	if d.CPU.Count < 1 {
		f.Add("cpu.count %d is less than 1", d.CPU.Count)
	}
	if d.Memory.Bytes < minMemory || d.Memory.Bytes%memoryStep != 0 {
		f.Add("memory.bytes %d is less than %d MiB or no multiple of 2 MiB", d.Memory.Bytes, minMemory>>20)
	}
	switch m := d.Memory; {
	case m.MaxBytes == 0:
	case m.MaxBytes < m.Bytes || m.MaxBytes%memoryStep != 0:
		f.Add("memory.max_bytes %d is less than memory.bytes or no multiple of 2 MiB", m.MaxBytes)
	case !m.Shared:
		f.Add("memory.max_bytes needs memory.shared")
	}
	if a := d.Arch(); a != ArchAMD64 && a != ArchS390X {
		f.Add("architecture %q is neither %q nor %q", d.Architecture, ArchAMD64, ArchS390X)
	}
	f.boot(d)
	f.vsock(d)
	f.disks(d)
	f.nics(d)
	if d.SharedDirectories < 0 {
		f.Add("shared_directories %d is negative", d.SharedDirectories)
	}
	if d.SharedDirectories > 0 && !d.Memory.Shared {
		f.Add("shared_directories needs memory.shared")
	}
	f = append(f, d.ConfidentialFaults()...)
	return f
}

func (f *Faults) boot(d Document) {
	b, arch := d.Boot, d.Arch()
	if !filepath.IsAbs(b.Kernel) {
		f.Add("boot.kernel %q is no absolute path", b.Kernel)
	}
	if b.Firmware != "" && !filepath.IsAbs(b.Firmware) {
		f.Add("boot.firmware %q is no absolute path", b.Firmware)
	}
	if b.Firmware != "" && arch != ArchAMD64 {
		f.Add("boot.firmware is for %s, not for %s", ArchAMD64, arch)
	}
	if b.Sealed {
		if arch != ArchS390X {
			f.Add("boot.sealed is for %s, not for %s", ArchS390X, arch)
		}
		if b.Initrd != "" || len(b.Parameters) > 0 {
			f.Add("boot.sealed: initrd and parameters are in the sealed image, others would not be used")
		}
		return
	}
	if !filepath.IsAbs(b.Initrd) {
		f.Add("boot.initrd %q is no absolute path", b.Initrd)
	}
	for _, p := range b.Parameters {
		if p == "" || strings.ContainsFunc(p, func(r rune) bool { return unicode.IsSpace(r) || unicode.IsControl(r) }) {
			f.Add("boot.parameters: %q is empty or has white space or control characters", p)
		}
	}
	if n := len(strings.Join(b.Parameters, " ")); n > maxCommandLine && arch == ArchAMD64 {
		f.Add("boot.parameters have %d bytes, the kernel takes %d", n, maxCommandLine)
	}
}

func (f *Faults) vsock(d Document) {
	switch d.Vsock.Kind {
	case VsockVhost, VsockHybrid:
	case VsockVhostUser:
		if !d.Memory.Shared {
			f.Add("vsock.kind %q needs memory.shared", d.Vsock.Kind)
		}
	default:
		f.Add("vsock.kind %q is none of %q, %q and %q", d.Vsock.Kind, VsockVhost, VsockVhostUser, VsockHybrid)
	}
	if d.Vsock.CID < 3 || d.Vsock.CID == 1<<32-1 {
		f.Add("vsock.cid %d is not between 3 and 4294967294", d.Vsock.CID)
	}
}

// unique adds a fault for each value that is there twice.
func (f *Faults) unique(what string) func(string) {
	seen := make(map[string]bool)
	return func(v string) {
		if seen[v] {
			f.Add("%s %q is there twice", what, v)
		}
		seen[v] = true
	}
}

func (f *Faults) disks(d Document) {
	id, serial := f.unique("disk id"), f.unique("disk serial")
	for _, disk := range d.Disks {
		*f = append(*f, disk.faults()...)
		id(disk.ID)
		serial(disk.Serial)
	}
}

func (f *Faults) nics(d Document) {
	id := f.unique("nic id")
	for _, n := range d.NICs {
		if !deviceIDPattern.MatchString(n.ID) {
			f.Add("nic id %q is not 1 to 32 letters, digits, '_', '-'", n.ID)
		}
		id(n.ID)
		if mac, err := net.ParseMAC(n.MAC); err != nil || len(mac) != 6 || mac[0]&1 != 0 {
			f.Add("nic %s: %q is no unicast Ethernet address", n.ID, n.MAC)
		}
		if n.MTU != 0 && (n.MTU < 68 || n.MTU > 65535) {
			f.Add("nic %s: MTU %d is not between 68 and 65535", n.ID, n.MTU)
		}
	}
}

// Validate checks a disk without looking at the host: errdefs.ErrInvalidArgument, all faults in one.
func (d Disk) Validate() error { return d.faults().Err() }

func (d Disk) faults() (f Faults) {
	if !deviceIDPattern.MatchString(d.ID) {
		f.Add("disk id %q is not 1 to 32 letters, digits, '_', '-'", d.ID)
	}
	if !serialPattern.MatchString(d.Serial) {
		f.Add("disk %s: serial %q is not 1 to 20 letters, digits, '_', '-'", d.ID, d.Serial)
	}
	if !filepath.IsAbs(d.Path) {
		f.Add("disk %s: %q is no absolute path", d.ID, d.Path)
	}
	return f
}

// Validate checks a shared directory without looking at the host: errdefs.ErrInvalidArgument, all faults in one.
func (s SharedDirectory) Validate() error {
	var f Faults
	if !deviceIDPattern.MatchString(s.ID) {
		f.Add("shared directory id %q is not 1 to 32 letters, digits, '_', '-'", s.ID)
	}
	if s.Tag == "" || len(s.Tag) > maxTag || strings.ContainsFunc(s.Tag, func(r rune) bool { return r <= ' ' || r > '~' }) {
		f.Add("shared directory %s: tag %q is not 1 to %d visible ASCII characters", s.ID, s.Tag, maxTag)
	}
	if !filepath.IsAbs(s.Socket) {
		f.Add("shared directory %s: socket %q is no absolute path", s.ID, s.Socket)
	}
	return f.Err()
}
