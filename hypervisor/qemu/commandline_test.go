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
			"vhost-user-vsock-pci", "vhost-vsock-pci", "virtio-balloon-pci", "virtio-mem-pci",
			"virtio-net-pci", "virtio-scsi-pci", "sev-snp-guest",
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
		SharedDirectories: 9,
		Sandboxed:         true,
	}
}

func TestCommandLineGolden(t *testing.T) {
	for name, tc := range goldenCases() {
		t.Run(name, func(t *testing.T) {
			c := tc.commandLine(t, tc.features)
			got := strings.Join(c.args, "\n") + "\n# inherited: " + strings.Join(c.files, " ") + "\n"
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
	_, err := newCommandLine(goldenDocument(), Features{Architecture: hypervisor.ArchAMD64}, nil)
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
	_, err = newCommandLine(doc, f, nil)
	require.ErrorAs(t, err, &missing)
	require.Equal(t, []string{"kvm-accel", "vhost-vsock-pci"}, missing.What)
}

// What holds for every VMM is tested with package hypervisor; this is what QEMU's machines have no room for.
func TestValidate(t *testing.T) {
	d := new(Driver)
	for name, doc := range map[string]hypervisor.Document{
		"plain": goldenDocument(), "confidential": confidentialDocument(), "snp": snpDocument(), "tdx": tdxDocument(),
		"s390x": s390xDocument(), "se": seDocument(),
	} {
		require.NoError(t, d.Validate(doc), name)
	}
	for name, tc := range map[string]struct {
		change func(*hypervisor.Document)
		says   string
	}{
		"what holds for every VMM": {func(d *hypervisor.Document) { d.ID = "a/b" }, "id"},
		"cpu model":                {func(d *hypervisor.Document) { d.CPU.Model = "max -device x" }, "cpu.model"},
		"cpu count":                {func(d *hypervisor.Document) { d.CPU.Count = 241 }, "more than 240"},
		"disks":                    {func(d *hypervisor.Document) { d.Disks = make([]hypervisor.Disk, maxDisks+1) }, "disks are more than"},
		"nics":                     {func(d *hypervisor.Document) { d.NICs = make([]hypervisor.NIC, maxNICs+1) }, "9 NICs are more than 8"},
		"shared directories":       {func(d *hypervisor.Document) { d.SharedDirectories = 33 }, "shared_directories 33 is more than 32"},
		"shared directories, s390x": {func(d *hypervisor.Document) {
			d.Architecture = hypervisor.ArchS390X
		}, "shared_directories is for amd64"},
	} {
		t.Run(name, func(t *testing.T) {
			doc := goldenDocument()
			tc.change(&doc)
			err := d.Validate(doc)
			require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
			require.ErrorContains(t, err, tc.says)
		})
	}
}

func TestValidateRefusesHybridVsock(t *testing.T) {
	d := goldenDocument()
	d.Vsock.Kind = hypervisor.VsockHybrid
	require.ErrorContains(t, new(Driver).Validate(d), "QEMU has no such device")
}
