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
		Version:      "10.0.2",
		Architecture: hypervisor.ArchAMD64,
		Machine:      "pc-q35-10.0",
		MachineOptions: []string{
			"usb", "vmport", "smm", "sata", "smbus", "i8042", "hpet", "dump-guest-core",
		},
		Types: []string{
			"kvm-accel", "tcg-accel", "memory-backend-memfd", "pcie-root-port", "scsi-hd", "vhost-user-fs-pci",
			"vhost-user-vsock-pci", "vhost-vsock-pci", "virtio-net-pci", "virtio-scsi-pci", "sev-snp-guest",
		},
		Objects: map[string][]string{typeSNP: {
			"author-key-enabled", "cbitpos", "guest-visible-workarounds", "host-data", "id-auth", "id-block", "kernel-hashes",
			"policy", "reduced-phys-bits", "sev-device", "vcek-disabled",
		}},
		Sandbox: true,
	}
}

func goldenDocument() hypervisor.Document {
	return hypervisor.Document{
		ID:           "0123abc",
		Architecture: hypervisor.ArchAMD64,
		UUID:         "7d444840-9dc0-11d1-b245-5ffdce74fad2",
		Accelerator:  hypervisor.AccelTCG,
		CPU:          hypervisor.CPU{Model: "max", Count: 2},
		Memory:       hypervisor.Memory{Bytes: 512 << 20, Shared: true},
		Boot: hypervisor.Boot{
			Kernel: goldenKernel, Initrd: goldenInitrd,
			Parameters: []string{"console=ttyS0", "panic=-1"},
		},
		Vsock:             hypervisor.Vsock{Kind: hypervisor.VsockVhostUser, CID: 3},
		NICs:              []hypervisor.NIC{{ID: "eth0", MAC: "02:00:00:00:00:01", MTU: 1450}},
		SharedFolderPorts: 9,
		Sandboxed:         true,
	}
}

func TestCommandLineGolden(t *testing.T) {
	for name, tc := range goldenCases() {
		t.Run(name, func(t *testing.T) {
			c := tc.commandLine(t, tc.features)
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
	_, err := NewCommandLine(goldenDocument(), Features{Architecture: hypervisor.ArchAMD64}, nil)
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
