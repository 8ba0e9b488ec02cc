// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"unicode"

	"github.com/containerd/errdefs"
	"github.com/google/uuid"

	"github.com/cloister-project/cloister/hypervisor"
)

const (
	memoryStep = 2 << 20
	minMemory  = 64 << 20
	// maxCPUs keeps APIC ids in 8 bits: no interrupt remapping needed.
	maxCPUs = 240
	// maxCommandLine is COMMAND_LINE_SIZE of x86 Linux less the final NUL. What an s390x kernel takes is in its header.
	maxCommandLine = 2047
	maxNICs        = 8
	maxFolderPorts = 32
	maxTag         = 36 // VIRTIO_FS tag field
	// The guest finds a disk by its serial, and a VM's disks by ids spread over maxDisks addresses.
	maxDisks = scsiTargets * scsiLUNs
)

var (
	sandboxIDPattern = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_.-]{0,127}$`)
	deviceIDPattern  = regexp.MustCompile(`^[A-Za-z0-9_-]{1,32}$`)
	serialPattern    = regexp.MustCompile(`^[A-Za-z0-9_-]{1,20}$`)
	cpuModelPattern  = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_.-]*(,[+-]?[a-z0-9][a-z0-9_.-]*(=[A-Za-z0-9]+)?)*$`)
)

// faults collects everything wrong with a document.
type faults []error

func (f *faults) add(format string, a ...any) { *f = append(*f, fmt.Errorf(format, a...)) }

// Validate checks everything about a document that can be told without touching the host. The error wraps
// errdefs.ErrInvalidArgument and names every fault.
func Validate(doc hypervisor.Document) error {
	var f faults
	if !sandboxIDPattern.MatchString(doc.ID) {
		f.add("id %q is no safe path element of 1 to 128 letters, digits, '_', '.', '-'", doc.ID)
	}
	if _, err := uuid.Parse(doc.UUID); err != nil || len(doc.UUID) != 36 {
		f.add("uuid %q is not of the form xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx", doc.UUID)
	}
	if doc.Accelerator != hypervisor.AccelKVM && doc.Accelerator != hypervisor.AccelTCG {
		f.add("accelerator %q is neither %q nor %q", doc.Accelerator, hypervisor.AccelKVM, hypervisor.AccelTCG)
	}
	if !cpuModelPattern.MatchString(doc.CPU.Model) {
		f.add("cpu.model %q is no CPU model", doc.CPU.Model)
	}
	if doc.CPU.Count < 1 || doc.CPU.Count > maxCPUs {
		f.add("cpu.count %d is not between 1 and %d", doc.CPU.Count, maxCPUs)
	}
	if doc.Memory.Bytes < minMemory || doc.Memory.Bytes%memoryStep != 0 {
		f.add("memory.bytes %d is less than %d MiB or no multiple of 2 MiB", doc.Memory.Bytes, minMemory>>20)
	}
	if qemuTarget[architecture(doc)] == "" {
		f.add("architecture %q is neither %q nor %q", doc.Architecture, hypervisor.ArchAMD64, hypervisor.ArchS390X)
	}
	f.boot(doc)
	f.vsock(doc)
	f.devices(doc)
	f.confidential(doc)
	return f.err()
}

func (f faults) err() error {
	if len(f) == 0 {
		return nil
	}
	return fmt.Errorf("the VM's description is not valid: %w (%w)", errors.Join(f...), errdefs.ErrInvalidArgument)
}

func (f *faults) boot(doc hypervisor.Document) {
	b, arch := doc.Boot, architecture(doc)
	if !filepath.IsAbs(b.Kernel) {
		f.add("boot.kernel %q is no absolute path", b.Kernel)
	}
	if b.Firmware != "" && !filepath.IsAbs(b.Firmware) {
		f.add("boot.firmware %q is no absolute path", b.Firmware)
	}
	if b.Firmware != "" && arch != hypervisor.ArchAMD64 {
		f.add("boot.firmware is for %s, not for %s", hypervisor.ArchAMD64, arch)
	}
	if b.Sealed {
		if arch != hypervisor.ArchS390X {
			f.add("boot.sealed is for %s, not for %s", hypervisor.ArchS390X, arch)
		}
		if b.Initrd != "" || len(b.Parameters) > 0 {
			f.add("boot.sealed: initrd and parameters are in the sealed image, others would not be used")
		}
		return
	}
	if !filepath.IsAbs(b.Initrd) {
		f.add("boot.initrd %q is no absolute path", b.Initrd)
	}
	for _, p := range b.Parameters {
		if p == "" || strings.ContainsFunc(p, func(r rune) bool { return unicode.IsSpace(r) || unicode.IsControl(r) }) {
			f.add("boot.parameters: %q is empty or has white space or control characters", p)
		}
	}
	if n := len(strings.Join(b.Parameters, " ")); n > maxCommandLine && arch == hypervisor.ArchAMD64 {
		f.add("boot.parameters have %d bytes, the kernel takes %d", n, maxCommandLine)
	}
}

func (f *faults) vsock(doc hypervisor.Document) {
	switch doc.Vsock.Kind {
	case hypervisor.VsockVhost:
	case hypervisor.VsockVhostUser:
		if !doc.Memory.Shared {
			f.add("vsock.kind %q needs memory.shared", doc.Vsock.Kind)
		}
	default:
		f.add("vsock.kind %q is neither %q nor %q", doc.Vsock.Kind, hypervisor.VsockVhost, hypervisor.VsockVhostUser)
	}
	if doc.Vsock.CID < 3 || doc.Vsock.CID == 1<<32-1 {
		f.add("vsock.cid %d is not between 3 and 4294967294", doc.Vsock.CID)
	}
}

func (f *faults) devices(doc hypervisor.Document) {
	ids, serials := make(map[string]bool), make(map[string]bool)
	unique := func(seen map[string]bool, what, v string) {
		if seen[v] {
			f.add("%s %q is there twice", what, v)
		}
		seen[v] = true
	}
	if len(doc.Disks) > maxDisks {
		f.add("%d disks are more than %d", len(doc.Disks), maxDisks)
	}
	for _, d := range doc.Disks {
		f.disk(d)
		unique(ids, "disk id", d.ID)
		unique(serials, "disk serial", d.Serial)
	}
	if len(doc.NICs) > maxNICs {
		f.add("%d NICs are more than %d", len(doc.NICs), maxNICs)
	}
	clear(ids)
	for _, n := range doc.NICs {
		if !deviceIDPattern.MatchString(n.ID) {
			f.add("nic id %q is not 1 to 32 letters, digits, '_', '-'", n.ID)
		}
		unique(ids, "nic id", n.ID)
		if mac, err := net.ParseMAC(n.MAC); err != nil || len(mac) != 6 || mac[0]&1 != 0 {
			f.add("nic %s: %q is no unicast Ethernet address", n.ID, n.MAC)
		}
		if n.MTU != 0 && (n.MTU < 68 || n.MTU > 65535) {
			f.add("nic %s: MTU %d is not between 68 and 65535", n.ID, n.MTU)
		}
	}
	if doc.SharedFolderPorts < 0 || doc.SharedFolderPorts > maxFolderPorts {
		f.add("shared_folder_ports %d is not between 0 and %d", doc.SharedFolderPorts, maxFolderPorts)
	}
	if doc.SharedFolderPorts > 0 && architecture(doc) != hypervisor.ArchAMD64 {
		f.add("shared_folder_ports is for %s, not for %s: there is no place for hot-plugged PCI devices", hypervisor.ArchAMD64, architecture(doc))
	}
	if doc.SharedFolderPorts > 0 && !doc.Memory.Shared {
		f.add("shared_folder_ports needs memory.shared")
	}
}

func (f *faults) disk(d hypervisor.Disk) {
	if !deviceIDPattern.MatchString(d.ID) {
		f.add("disk id %q is not 1 to 32 letters, digits, '_', '-'", d.ID)
	}
	if !serialPattern.MatchString(d.Serial) {
		f.add("disk %s: serial %q is not 1 to 20 letters, digits, '_', '-'", d.ID, d.Serial)
	}
	if !filepath.IsAbs(d.Path) {
		f.add("disk %s: %q is no absolute path", d.ID, d.Path)
	}
}

func validateFolder(s hypervisor.SharedFolder) error {
	var f faults
	if !deviceIDPattern.MatchString(s.ID) {
		f.add("shared folder id %q is not 1 to 32 letters, digits, '_', '-'", s.ID)
	}
	if s.Tag == "" || len(s.Tag) > maxTag || strings.ContainsFunc(s.Tag, func(r rune) bool { return r <= ' ' || r > '~' }) {
		f.add("shared folder %s: tag %q is not 1 to %d visible ASCII characters", s.ID, s.Tag, maxTag)
	}
	if !filepath.IsAbs(s.Socket) {
		f.add("shared folder %s: socket %q is no absolute path", s.ID, s.Socket)
	}
	return f.err()
}

// diskDriver tells QEMU's block driver for the file at path: a regular file or a block device, by what it is.
func diskDriver(path string) (string, error) {
	fi, err := os.Stat(path)
	switch {
	case err != nil:
		return "", err
	case fi.Mode().IsRegular() && fi.Size() == 0:
		return "", fmt.Errorf("disk image %s is empty: %w", path, errdefs.ErrInvalidArgument)
	case fi.Mode().IsRegular():
		return "file", nil
	case fi.Mode()&os.ModeDevice != 0 && fi.Mode()&os.ModeCharDevice == 0:
		return "host_device", nil
	}
	return "", fmt.Errorf("disk %s is neither a regular file nor a block device: %w", path, errdefs.ErrInvalidArgument)
}
