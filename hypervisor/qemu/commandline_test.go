// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"

	"github.com/cloister-project/cloister/hypervisor"
)

var update = flag.Bool("update", false, "write testdata/*.golden anew")

// debianFeatures are those of QEMU 10.0.2 of Debian's backports.
func debianFeatures() Features {
	return Features{
		Version: "10.0.2",
		Machine: "pc-q35-10.0",
		MachineOptions: []string{
			"usb", "vmport", "smm", "sata", "smbus", "i8042", "hpet", "dump-guest-core",
		},
		Types:   wantedTypes[:],
		Sandbox: true,
	}
}

func goldenDocument() hypervisor.Document {
	return hypervisor.Document{
		ID:          "0123abc",
		UUID:        "7d444840-9dc0-11d1-b245-5ffdce74fad2",
		Accelerator: hypervisor.AccelTCG,
		CPU:         hypervisor.CPU{Model: "max", Count: 2},
		Memory:      hypervisor.Memory{Bytes: 512 << 20, Shared: true},
		Boot: hypervisor.Boot{
			Kernel: "/var/cache/cloister/vmlinux,1", Initrd: "/usr/share/cloister/initrd",
			Parameters: []string{"console=ttyS0", "panic=-1"},
		},
		Vsock:             hypervisor.Vsock{Kind: hypervisor.VsockVhostUser, CID: 3},
		NICs:              []hypervisor.NIC{{ID: "eth0", MAC: "02:00:00:00:00:01", MTU: 1450}},
		SharedFolderPorts: 9,
		Sandboxed:         true,
	}
}

func TestCommandLineGolden(t *testing.T) {
	for name, tc := range map[string]struct {
		doc      func(*hypervisor.Document)
		features func(*Features)
	}{
		"tcg-vhost-user": {},
		"kvm-vhost": {doc: func(d *hypervisor.Document) {
			d.Accelerator, d.CPU.Model = hypervisor.AccelKVM, "host"
			d.Memory.Shared, d.SharedFolderPorts = false, 0
			d.Vsock = hypervisor.Vsock{Kind: hypervisor.VsockVhost, CID: 4711}
			d.NICs = []hypervisor.NIC{
				{ID: "eth0", MAC: "02:00:00:00:00:01", VhostNet: true},
				{ID: "eth1", MAC: "02:00:00:00:00:02"},
			}
			d.Disks = []hypervisor.Disk{
				{ID: "layer0", Path: "/var/lib/cloister/layers/a,b.erofs", Serial: "layer0", ReadOnly: true},
				{ID: "scratch", Path: "/var/lib/cloister/scratch", Serial: "scratch"},
			}
		}},
		"old-qemu": {
			doc: func(d *hypervisor.Document) { d.NICs, d.SharedFolderPorts, d.Sandboxed = nil, 0, false },
			features: func(f *Features) {
				f.Machine, f.MachineOptions, f.Sandbox = "pc-q35-7.2", []string{"usb"}, false
			},
		},
		"exit-with-parent": {features: func(f *Features) { f.ExitWithParent = true }},
	} {
		t.Run(name, func(t *testing.T) {
			doc, features := goldenDocument(), debianFeatures()
			if tc.doc != nil {
				tc.doc(&doc)
			}
			if tc.features != nil {
				tc.features(&features)
			}
			require.NoError(t, Validate(doc))
			c, err := NewCommandLine(doc, features, map[string]string{"layer0": "file", "scratch": "host_device"})
			require.NoError(t, err)
			got := strings.Join(c.Args, "\n") + "\n# inherited: " + strings.Join(c.Files, " ") + "\n"
			golden := filepath.Join("testdata", name+".golden")
			if *update {
				require.NoError(t, os.WriteFile(golden, []byte(got), 0o644))
			}
			want, err := os.ReadFile(golden)
			require.NoError(t, err)
			require.Equal(t, string(want), got, "run with -update if the change is meant")
		})
	}
}

func TestCommandLineNeedsFeatures(t *testing.T) {
	_, err := NewCommandLine(goldenDocument(), Features{}, nil)
	require.ErrorIs(t, err, errdefs.ErrNotImplemented)
	var missing *Missing
	require.ErrorAs(t, err, &missing)
	require.Equal(t, []string{"virtio-scsi-pci", "scsi-hd", "tcg-accel", "the q35 machine", "memory-backend-memfd", "vhost-user-vsock-pci",
		"virtio-net-pci", "pcie-root-port", "vhost-user-fs-pci", "seccomp (-sandbox)"}, missing.What)

	doc := goldenDocument()
	doc.Accelerator = hypervisor.AccelKVM
	doc.Vsock.Kind = hypervisor.VsockVhost
	f := debianFeatures()
	f.Types = []string{"virtio-scsi-pci", "scsi-hd", "memory-backend-memfd", "virtio-net-pci", "pcie-root-port", "vhost-user-fs-pci"}
	_, err = NewCommandLine(doc, f, nil)
	require.ErrorAs(t, err, &missing)
	require.Equal(t, []string{"kvm-accel", "vhost-vsock-pci"}, missing.What)
}

func TestValidate(t *testing.T) {
	require.NoError(t, Validate(goldenDocument()))
	for name, tc := range map[string]struct {
		change func(*hypervisor.Document)
		says   string
	}{
		"id":              {func(d *hypervisor.Document) { d.ID = "a/b" }, "id"},
		"id with comma":   {func(d *hypervisor.Document) { d.ID = "a,process=x" }, "id"},
		"uuid":            {func(d *hypervisor.Document) { d.UUID = "{7d444840-9dc0-11d1-b245-5ffdce74fad2}" }, "uuid"},
		"accelerator":     {func(d *hypervisor.Document) { d.Accelerator = "xen" }, "accelerator"},
		"cpu model":       {func(d *hypervisor.Document) { d.CPU.Model = "max -device x" }, "cpu.model"},
		"cpu count":       {func(d *hypervisor.Document) { d.CPU.Count = 0 }, "cpu.count"},
		"little memory":   {func(d *hypervisor.Document) { d.Memory.Bytes = 2 << 20 }, "memory.bytes"},
		"odd memory":      {func(d *hypervisor.Document) { d.Memory.Bytes++ }, "memory.bytes"},
		"kernel":          {func(d *hypervisor.Document) { d.Boot.Kernel = "vmlinux" }, "boot.kernel"},
		"initrd":          {func(d *hypervisor.Document) { d.Boot.Initrd = "" }, "boot.initrd"},
		"parameter":       {func(d *hypervisor.Document) { d.Boot.Parameters = []string{"a b"} }, "boot.parameters"},
		"long parameters": {func(d *hypervisor.Document) { d.Boot.Parameters = []string{strings.Repeat("x", 2048)} }, "2048 bytes"},
		"vsock kind":      {func(d *hypervisor.Document) { d.Vsock.Kind = "" }, "vsock.kind"},
		"vsock cid":       {func(d *hypervisor.Document) { d.Vsock.CID = 2 }, "vsock.cid"},
		"memory shared":   {func(d *hypervisor.Document) { d.Memory.Shared = false }, "memory.shared"},
		"nic id":          {func(d *hypervisor.Document) { d.NICs[0].ID = "a,b" }, "nic id"},
		"nic mac":         {func(d *hypervisor.Document) { d.NICs[0].MAC = "01:00:00:00:00:00" }, "unicast"},
		"nic mtu":         {func(d *hypervisor.Document) { d.NICs[0].MTU = 60 }, "MTU"},
		"nic twice":       {func(d *hypervisor.Document) { d.NICs = append(d.NICs, d.NICs[0]) }, "twice"},
		"disk id":         {func(d *hypervisor.Document) { d.Disks = []hypervisor.Disk{{ID: "ä", Serial: "a", Path: "/a"}} }, "disk id"},
		"disk serial": {func(d *hypervisor.Document) {
			d.Disks = []hypervisor.Disk{{ID: "a", Serial: strings.Repeat("a", 21), Path: "/a"}}
		}, "serial"},
		"disk path": {func(d *hypervisor.Document) { d.Disks = []hypervisor.Disk{{ID: "a", Serial: "a", Path: "a"}} }, "absolute"},
		"disk serial same": {func(d *hypervisor.Document) {
			d.Disks = []hypervisor.Disk{{ID: "a", Serial: "a", Path: "/a"}, {ID: "b", Serial: "a", Path: "/a"}}
		}, "twice"},
		"folder ports": {func(d *hypervisor.Document) { d.SharedFolderPorts = 33 }, "shared_folder_ports"},
	} {
		t.Run(name, func(t *testing.T) {
			doc := goldenDocument()
			tc.change(&doc)
			err := Validate(doc)
			require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
			require.ErrorContains(t, err, tc.says)
		})
	}
	err := Validate(hypervisor.Document{})
	for _, field := range []string{"id", "uuid", "accelerator", "cpu.model", "cpu.count", "memory.bytes", "boot.kernel", "vsock.kind", "vsock.cid"} {
		require.ErrorContains(t, err, field)
	}
	require.ErrorIs(t, validateFolder(hypervisor.SharedFolder{ID: "a", Tag: "ä", Socket: "/s"}), errdefs.ErrInvalidArgument)
	require.ErrorIs(t, validateFolder(hypervisor.SharedFolder{ID: "a", Tag: strings.Repeat("a", 37), Socket: "s"}), errdefs.ErrInvalidArgument)
	require.NoError(t, validateFolder(hypervisor.SharedFolder{ID: "a", Tag: "a", Socket: "/s"}))
}
