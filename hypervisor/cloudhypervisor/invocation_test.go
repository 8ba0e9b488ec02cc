// SPDX-License-Identifier: Apache-2.0

package cloudhypervisor

import (
	"bytes"
	"encoding/json"
	"flag"
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"

	"github.com/cloister-project/cloister/hypervisor"
	"github.com/cloister-project/cloister/tee/abi"
)

var update = flag.Bool("update", false, "write testdata/*.json anew")

func document() hypervisor.Document {
	return hypervisor.Document{
		ID:          "0123abc",
		UUID:        "7d444840-9dc0-11d1-b245-5ffdce74fad2",
		Accelerator: hypervisor.AccelKVM,
		CPU:         hypervisor.CPU{Model: "host", Count: 2},
		Memory:      hypervisor.Memory{Bytes: 512 << 20},
		Boot: hypervisor.Boot{
			Kernel: "/var/cache/cloister/vmlinux", Initrd: "/usr/share/cloister/initrd",
			Parameters: []string{"console=ttyS0", "panic=-1"},
		},
		Vsock: hypervisor.Vsock{Kind: hypervisor.VsockHybrid, CID: 3},
	}
}

// snpDocument makes a document one for SEV-SNP.
func snpDocument(d *hypervisor.Document) {
	d.CPU.Model, d.Sandboxed = "", true
	d.Boot.Firmware = "/usr/share/cloister/igvm/snp-2.igvm"
	d.Confidential = &hypervisor.Confidential{Platform: abi.SNP, SNP: &hypervisor.SNP{
		CBitPosition: 51, ReducedPhysBits: 1, Policy: 0x30000, KernelHashes: true, HostData: bytes.Repeat([]byte{0xab}, abi.SNPHostDataSize),
	}}
}

func TestInvocationGolden(t *testing.T) {
	for name, change := range map[string]func(*hypervisor.Document){
		"plain":     func(*hypervisor.Document) {},
		"sandboxed": func(d *hypervisor.Document) { d.Sandboxed = true },
		"devices": func(d *hypervisor.Document) {
			d.CPU.Model, d.Memory.Shared, d.Memory.Reporting, d.SharedDirectories, d.Sandboxed = "", true, true, 9, true
			d.NICs = []hypervisor.NIC{{ID: "eth0", MAC: "02:00:00:00:00:01", MTU: 1450}, {ID: "eth1", MAC: "02:00:00:00:00:02"}}
			d.Disks = []hypervisor.Disk{
				{ID: "layer0", Path: "/var/lib/cloister/layers/a,b.erofs", Serial: "layer0", ReadOnly: true},
				{ID: "scratch", Path: "/var/lib/cloister/scratch", Serial: "scratch"},
			}
		},
		"snp": snpDocument,
	} {
		t.Run(name, func(t *testing.T) {
			d := document()
			change(&d)
			require.NoError(t, new(Driver).Validate(d))
			inv, err := newInvocation(d, "/usr/bin/cloud-hypervisor", "/run/cloister/0123abc")
			require.NoError(t, err)
			for _, r := range inv.Requests {
				require.Empty(t, checkRequest(r), r.Path)
			}
			got, err := json.MarshalIndent(inv, "", "  ")
			require.NoError(t, err)
			got = append(got, '\n')
			golden := filepath.Join("testdata", name+".json")
			if *update {
				require.NoError(t, os.WriteFile(golden, got, 0o644))
			}
			want, err := os.ReadFile(golden)
			require.NoError(t, err)
			require.Equal(t, string(want), string(got), "run with -update if the change is meant")
		})
	}
}

func TestValidateRefuses(t *testing.T) {
	confidential := func(c hypervisor.Confidential) func(*hypervisor.Document) {
		return func(d *hypervisor.Document) { d.Confidential = &c }
	}
	for name, tc := range map[string]struct {
		change func(*hypervisor.Document)
		want   string
	}{
		"what no VMM takes": {func(d *hypervisor.Document) { d.ID = "../x" }, `id "../x"`},
		"s390x":             {func(d *hypervisor.Document) { d.Architecture = hypervisor.ArchS390X }, `architecture "s390x"`},
		"tcg":               {func(d *hypervisor.Document) { d.Accelerator = hypervisor.AccelTCG }, "it does not emulate"},
		"CPU model":         {func(d *hypervisor.Document) { d.CPU.Model = "EPYC-v4" }, "has no CPU models"},
		"many CPUs":         {func(d *hypervisor.Document) { d.CPU.Count = maxCPUs + 1 }, "cpu.count 241"},
		"firmware":          {func(d *hypervisor.Document) { d.Boot.Firmware = "/ovmf.fd" }, "boot.firmware: Cloud Hypervisor"},
		"kernel vsock":      {func(d *hypervisor.Document) { d.Vsock.Kind = hypervisor.VsockVhost }, `vsock.kind "vhost": Cloud`},
		"embedded vsock": {func(d *hypervisor.Document) {
			d.Vsock.Kind, d.Memory.Shared = hypervisor.VsockVhostUser, true
		}, `vsock.kind "vhost-user": Cloud`},
		"vhost-net": {func(d *hypervisor.Document) {
			d.NICs = []hypervisor.NIC{{ID: "eth0", MAC: "02:00:00:00:00:01", VhostNet: true}}
		}, "vhost-net"},
		"many disks": {func(d *hypervisor.Document) { d.Disks = make([]hypervisor.Disk, maxDisks+1) }, "249 disks are more than 248"},
		"many devices": {func(d *hypervisor.Document) {
			d.Memory.Shared, d.SharedDirectories = true, maxOthers+1
		}, "29 NICs and shared directories"},
		"snp without an IGVM file": {func(d *hypervisor.Document) {
			snpDocument(d)
			d.Boot.Firmware = ""
		}, "needs boot.firmware"},
		"snp with an ID block": {func(d *hypervisor.Document) {
			snpDocument(d)
			d.Confidential.SNP.IDBlock, d.Confidential.SNP.IDAuth = make([]byte, abi.SNPIDBlockSize), make([]byte, abi.SNPIDAuthSize)
		}, "takes ID blocks from IGVM files only"},
		"tdx": {confidential(hypervisor.Confidential{Platform: abi.TDX, TDX: &hypervisor.TDX{}}), "no quotes"},
		"se": {confidential(hypervisor.Confidential{Platform: abi.SE, SecureExecution: true}),
			"does not run on IBM Z"},
		"sample": {confidential(hypervisor.Confidential{Platform: abi.Sample}), "only where hardware protects it"},
	} {
		t.Run(name, func(t *testing.T) {
			d := document()
			tc.change(&d)
			err := new(Driver).Validate(d)
			require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
			require.ErrorContains(t, err, tc.want)
		})
	}
	require.NoError(t, new(Driver).Validate(document()))
}
