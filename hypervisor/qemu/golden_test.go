// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"bytes"
	"encoding/binary"
	"slices"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/cloister-project/cloister/hypervisor"
	"github.com/cloister-project/cloister/tee/abi"
)

// Files that the golden documents name; the tests with a real QEMU put others in their place.
const (
	goldenKernel   = "/var/cache/cloister/vmlinux,1"
	goldenInitrd   = "/usr/share/cloister/initrd"
	goldenFirmware = "/usr/share/ovmf/OVMF.tee.fd"
	goldenLayer    = "/var/lib/cloister/layers/a,b.erofs"
	goldenScratch  = "/var/lib/cloister/scratch"
)

type goldenCase struct {
	doc      hypervisor.Document
	features Features
}

func (c goldenCase) commandLine(t *testing.T, f Features) commandLine {
	t.Helper()
	require.NoError(t, new(Driver).Validate(c.doc))
	cmdline, err := newCommandLine(c.doc, f, map[string]string{"layer0": "file", "scratch": "host_device"})
	require.NoError(t, err)
	return cmdline
}

// newestFeatures are those of QEMU 11.1 of Debian's sid.
func newestFeatures() Features {
	f := debianFeatures()
	f.Version, f.Machine, f.ExitWithParent = "11.1.3", "pc-q35-11.1", true
	f.Types = append(f.Types, typeTDX, typeMonitor)
	f.Objects[typeTDX] = []string{"attributes", "mrconfigid", "mrowner", "mrownerconfig", "quote-generation-socket", "sept-ve-disable"}
	return f
}

// s390xFeatures are those of qemu-system-s390x 10.0 of Debian's backports, and on a mainframe of KVM's.
func s390xFeatures() Features {
	return Features{
		Version: "10.0.2", Architecture: hypervisor.ArchS390X,
		Machine: "s390-ccw-virtio-10.0", MachineOptions: []string{"usb", "dump-guest-core"},
		Types: []string{
			"kvm-accel", "tcg-accel", "memory-backend-memfd", "scsi-hd", "vhost-user-vsock-pci", "vhost-vsock-ccw", "virtio-net-ccw",
			"virtio-scsi-ccw", "sclpconsole", "zpci", typeSE,
		},
		Sandbox: true,
	}
}

// confidentialDocument keeps all rules of a confidential VM, with nothing behind them.
func confidentialDocument() hypervisor.Document {
	d := goldenDocument()
	d.SharedDirectories = 0
	d.Confidential = &hypervisor.Confidential{Platform: abi.Sample}
	return d
}

func snpDocument() hypervisor.Document {
	d := confidentialDocument()
	d.Accelerator, d.CPU.Model, d.Boot.Firmware = hypervisor.AccelKVM, "EPYC-v4", goldenFirmware
	d.Confidential = &hypervisor.Confidential{Platform: abi.SNP, SNP: &hypervisor.SNP{
		CBitPosition: 51, ReducedPhysBits: 1, Policy: 0x30000, KernelHashes: true,
	}}
	return d
}

func tdxDocument() hypervisor.Document {
	d := confidentialDocument()
	d.Accelerator, d.CPU.Model, d.Boot.Firmware = hypervisor.AccelKVM, "host", goldenFirmware
	d.Confidential = &hypervisor.Confidential{Platform: abi.TDX, TDX: &hypervisor.TDX{Attributes: 1 << 28}}
	return d
}

func s390xDocument() hypervisor.Document {
	d := goldenDocument()
	d.Architecture, d.SharedDirectories = hypervisor.ArchS390X, 0
	d.Boot.Parameters = []string{"console=ttysclp0", "panic=-1"}
	return d
}

func seDocument() hypervisor.Document {
	d := s390xDocument()
	d.Accelerator, d.CPU.Model = hypervisor.AccelKVM, "host"
	d.Memory.Shared = false
	d.Boot = hypervisor.Boot{Kernel: goldenKernel, Sealed: true}
	d.Vsock = hypervisor.Vsock{Kind: hypervisor.VsockVhost, CID: 4711}
	d.Confidential = &hypervisor.Confidential{Platform: abi.SE, SecureExecution: true}
	return d
}

func filled(size int, value byte) []byte { return bytes.Repeat([]byte{value}, size) }

// withKernelVsock gives a document the kernel's vsock, vhost-net and disks at boot.
func withKernelVsock(d *hypervisor.Document) {
	d.Vsock = hypervisor.Vsock{Kind: hypervisor.VsockVhost, CID: 4711}
	d.NICs = []hypervisor.NIC{
		{ID: "eth0", MAC: "02:00:00:00:00:01", VhostNet: true},
		{ID: "eth1", MAC: "02:00:00:00:00:02"},
	}
	d.Disks = []hypervisor.Disk{
		{ID: "layer0", Path: goldenLayer, Serial: "layer0", ReadOnly: true},
		{ID: "scratch", Path: goldenScratch, Serial: "scratch"},
	}
}

// goldenCases are all kinds of command lines, by the name of the file in testdata.
func goldenCases() map[string]goldenCase {
	cases := make(map[string]goldenCase)
	add := func(name string, d hypervisor.Document, f Features, change func(*hypervisor.Document)) {
		if change != nil {
			change(&d)
		}
		cases[name] = goldenCase{doc: d, features: f}
	}

	add("tcg-vhost-user", goldenDocument(), debianFeatures(), func(d *hypervisor.Document) { d.Memory.Reporting = true })
	add("room", goldenDocument(), debianFeatures(), func(d *hypervisor.Document) { d.Memory.MaxBytes = d.Memory.Bytes + 4<<30 })
	add("kvm-vhost", goldenDocument(), debianFeatures(), func(d *hypervisor.Document) {
		d.Accelerator, d.CPU.Model = hypervisor.AccelKVM, "host"
		d.Memory.Shared, d.SharedDirectories = false, 0
		withKernelVsock(d)
	})
	old := debianFeatures()
	old.Machine, old.MachineOptions, old.Sandbox = "pc-q35-7.2", []string{"usb"}, false
	add("old-qemu", goldenDocument(), old, func(d *hypervisor.Document) { d.NICs, d.SharedDirectories, d.Sandboxed = nil, 0, false })
	parent := debianFeatures()
	parent.ExitWithParent = true
	add("exit-with-parent", goldenDocument(), parent, nil)

	add("sample", confidentialDocument(), debianFeatures(), nil)
	add("sample-vhost", confidentialDocument(), debianFeatures(), withKernelVsock)
	add("snp-minimal", snpDocument(), debianFeatures(), nil)
	add("snp-full", snpDocument(), debianFeatures(), func(d *hypervisor.Document) {
		withKernelVsock(d)
		s := d.Confidential.SNP
		s.Policy = 0x1f0000 &^ (1 << 19)
		s.HostData, s.IDBlock, s.IDAuth = filled(abi.SNPHostDataSize, 1), filled(abi.SNPIDBlockSize, 2), filled(abi.SNPIDAuthSize, 3)
		binary.LittleEndian.PutUint64(s.IDBlock[88:], s.Policy) // as a signed one has it: POLICY of ID_BLOCK, AMD 56860
		s.AuthorKey = true
	})
	add("tdx-minimal", tdxDocument(), newestFeatures(), nil)
	add("tdx-unix", tdxDocument(), newestFeatures(), func(d *hypervisor.Document) {
		withKernelVsock(d)
		x := d.Confidential.TDX
		x.MRConfigID, x.MROwner, x.MROwnerConfig = filled(abi.TDXDigestSize, 4), filled(abi.TDXDigestSize, 5), filled(abi.TDXDigestSize, 6)
		x.Attributes |= 1 << 63
		x.QuoteSocket = &hypervisor.QuoteSocket{Path: "/var/run/tdx-qgs/qgs.socket"}
	})
	add("tdx-vsock", tdxDocument(), newestFeatures(), func(d *hypervisor.Document) {
		d.Confidential.TDX.QuoteSocket = &hypervisor.QuoteSocket{CID: 2, Port: 4050}
	})
	add("s390x", s390xDocument(), s390xFeatures(), nil)
	add("s390x-vhost", s390xDocument(), s390xFeatures(), withKernelVsock)
	add("s390x-sample", s390xDocument(), s390xFeatures(), func(d *hypervisor.Document) {
		d.Confidential = &hypervisor.Confidential{Platform: abi.Sample}
	})
	add("se", seDocument(), s390xFeatures(), withKernelVsock)
	return cases
}

// withTypes returns the features of a real binary the types that a command line needs and the binary lacks, to see what
// the binary itself says.
func withTypes(f Features, c goldenCase) Features {
	for _, t := range c.features.Types {
		if t != typeMonitor && !slices.Contains(f.Types, t) {
			f.Types = append(slices.Clone(f.Types), t)
		}
	}
	objects := map[string][]string{}
	for kind, props := range c.features.Objects {
		objects[kind] = props
	}
	f.Objects = objects
	return f
}
