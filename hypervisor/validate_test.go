// SPDX-License-Identifier: Apache-2.0

package hypervisor

import (
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"

	"github.com/cloister-project/cloister/tee/abi"
)

func document() Document {
	return Document{
		ID:                "0123abc",
		Architecture:      ArchAMD64,
		UUID:              "7d444840-9dc0-11d1-b245-5ffdce74fad2",
		Accelerator:       AccelTCG,
		CPU:               CPU{Model: "max", Count: 2},
		Memory:            Memory{Bytes: 512 << 20, Shared: true},
		Boot:              Boot{Kernel: "/vmlinux", Initrd: "/initrd", Parameters: []string{"console=ttyS0", "panic=-1"}},
		Vsock:             Vsock{Kind: VsockVhostUser, CID: 3},
		NICs:              []NIC{{ID: "eth0", MAC: "02:00:00:00:00:01", MTU: 1450}},
		SharedDirectories: 9,
		Sandboxed:         true,
	}
}

func confidentialDocument() Document {
	d := document()
	d.SharedDirectories = 0
	d.Confidential = &Confidential{Platform: abi.Sample}
	return d
}

func snpDocument() Document {
	d := confidentialDocument()
	d.Accelerator, d.CPU.Model, d.Boot.Firmware = AccelKVM, "EPYC-v4", "/ovmf.fd"
	d.Confidential = &Confidential{Platform: abi.SNP, SNP: &SNP{CBitPosition: 51, ReducedPhysBits: 1, Policy: 0x30000, KernelHashes: true}}
	return d
}

func tdxDocument() Document {
	d := confidentialDocument()
	d.Accelerator, d.CPU.Model, d.Boot.Firmware = AccelKVM, "host", "/ovmf.fd"
	d.Confidential = &Confidential{Platform: abi.TDX, TDX: &TDX{Attributes: 1 << 28}}
	return d
}

func s390xDocument() Document {
	d := document()
	d.Architecture, d.SharedDirectories = ArchS390X, 0
	return d
}

func seDocument() Document {
	d := s390xDocument()
	d.Accelerator, d.CPU.Model, d.Vsock.Kind = AccelKVM, "host", VsockVhost
	d.Boot = Boot{Kernel: "/se.img", Sealed: true}
	d.Confidential = &Confidential{Platform: abi.SE, SecureExecution: true}
	return d
}

func TestValidate(t *testing.T) {
	require.NoError(t, document().Validate())
	for name, tc := range map[string]struct {
		change func(*Document)
		says   string
	}{
		"id":              {func(d *Document) { d.ID = "a/b" }, "id"},
		"id with comma":   {func(d *Document) { d.ID = "a,process=x" }, "id"},
		"uuid":            {func(d *Document) { d.UUID = "{7d444840-9dc0-11d1-b245-5ffdce74fad2}" }, "uuid"},
		"accelerator":     {func(d *Document) { d.Accelerator = "xen" }, "accelerator"},
		"cpu count":       {func(d *Document) { d.CPU.Count = 0 }, "cpu.count"},
		"little memory":   {func(d *Document) { d.Memory.Bytes = 2 << 20 }, "memory.bytes"},
		"odd memory":      {func(d *Document) { d.Memory.Bytes++ }, "memory.bytes"},
		"kernel":          {func(d *Document) { d.Boot.Kernel = "vmlinux" }, "boot.kernel"},
		"initrd":          {func(d *Document) { d.Boot.Initrd = "" }, "boot.initrd"},
		"parameter":       {func(d *Document) { d.Boot.Parameters = []string{"a b"} }, "boot.parameters"},
		"long parameters": {func(d *Document) { d.Boot.Parameters = []string{strings.Repeat("x", 2048)} }, "2048 bytes"},
		"vsock kind":      {func(d *Document) { d.Vsock.Kind = "" }, "vsock.kind"},
		"vsock cid":       {func(d *Document) { d.Vsock.CID = 2 }, "vsock.cid"},
		"memory shared":   {func(d *Document) { d.Memory.Shared = false }, "memory.shared"},
		"nic id":          {func(d *Document) { d.NICs[0].ID = "a,b" }, "nic id"},
		"nic mac":         {func(d *Document) { d.NICs[0].MAC = "01:00:00:00:00:00" }, "unicast"},
		"nic mtu":         {func(d *Document) { d.NICs[0].MTU = 60 }, "MTU"},
		"nic twice":       {func(d *Document) { d.NICs = append(d.NICs, d.NICs[0]) }, "twice"},
		"disk id":         {func(d *Document) { d.Disks = []Disk{{ID: "ä", Serial: "a", Path: "/a"}} }, "disk id"},
		"disk serial": {func(d *Document) {
			d.Disks = []Disk{{ID: "a", Serial: strings.Repeat("a", 21), Path: "/a"}}
		}, "serial"},
		"disk path": {func(d *Document) { d.Disks = []Disk{{ID: "a", Serial: "a", Path: "a"}} }, "absolute"},
		"disk serial same": {func(d *Document) {
			d.Disks = []Disk{{ID: "a", Serial: "a", Path: "/a"}, {ID: "b", Serial: "a", Path: "/a"}}
		}, "twice"},
		"shared directories": {func(d *Document) { d.SharedDirectories = -1 }, "shared_directories"},
	} {
		t.Run(name, func(t *testing.T) {
			doc := document()
			tc.change(&doc)
			err := doc.Validate()
			require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
			require.ErrorContains(t, err, tc.says)
		})
	}
	err := Document{}.Validate()
	for _, field := range []string{"id", "uuid", "accelerator", "cpu.count", "memory.bytes", "boot.kernel", "vsock.kind", "vsock.cid"} {
		require.ErrorContains(t, err, field)
	}
	require.ErrorIs(t, SharedDirectory{ID: "a", Tag: "ä", Socket: "/s"}.Validate(), errdefs.ErrInvalidArgument)
	require.ErrorIs(t, SharedDirectory{ID: "a", Tag: strings.Repeat("a", 37), Socket: "s"}.Validate(), errdefs.ErrInvalidArgument)
	require.NoError(t, SharedDirectory{ID: "a", Tag: "a", Socket: "/s"}.Validate())
}

func TestValidateConfidential(t *testing.T) {
	idBlock := func(d *Document) {
		s := d.Confidential.SNP
		s.IDBlock, s.IDAuth = make([]byte, abi.SNPIDBlockSize), make([]byte, abi.SNPIDAuthSize)
	}
	for _, doc := range []Document{confidentialDocument(), snpDocument(), tdxDocument(), s390xDocument(), seDocument()} {
		require.NoError(t, doc.Validate())
	}
	for name, tc := range map[string]struct {
		base   func() Document
		change func(*Document)
		says   string
	}{
		"architecture":           {document, func(d *Document) { d.Architecture = "riscv64" }, "architecture"},
		"relative firmware":      {document, func(d *Document) { d.Boot.Firmware = "OVMF.fd" }, "boot.firmware"},
		"sealed on amd64":        {document, func(d *Document) { d.Boot = Boot{Kernel: "/k", Sealed: true} }, "boot.sealed is for s390x"},
		"s390x firmware":         {s390xDocument, func(d *Document) { d.Boot.Firmware = "/f" }, "boot.firmware is for amd64"},
		"sealed with initrd":     {seDocument, func(d *Document) { d.Boot.Initrd = "/i" }, "in the sealed image"},
		"sealed with parameters": {seDocument, func(d *Document) { d.Boot.Parameters = []string{"quiet"} }, "in the sealed image"},

		"shared directories": {confidentialDocument, func(d *Document) { d.SharedDirectories = 1 }, "no shared directories"},
		"no platform":        {confidentialDocument, func(d *Document) { d.Confidential.Platform = "" }, "is not known"},
		"unknown platform":   {confidentialDocument, func(d *Document) { d.Confidential.Platform = "sev" }, "is not known"},
		"platform, no part":  {confidentialDocument, func(d *Document) { d.Confidential.Platform = abi.SNP }, "nothing would protect"},
		"part, no platform":  {snpDocument, func(d *Document) { d.Confidential.Platform = abi.Sample }, "another platform's part"},
		"two platforms":      {snpDocument, func(d *Document) { d.Confidential.TDX = &TDX{} }, "more than one platform"},
		"emulated":           {snpDocument, func(d *Document) { d.Accelerator = AccelTCG }, "only KVM"},

		"snp on s390x":      {snpDocument, func(d *Document) { d.Architecture = ArchS390X }, "is of the architecture amd64"},
		"snp firmware":      {snpDocument, func(d *Document) { d.Boot.Firmware = "" }, "needs boot.firmware"},
		"snp kernel hashes": {snpDocument, func(d *Document) { d.Confidential.SNP.KernelHashes = false }, "kernel_hashes must be set"},
		"snp C-bit":         {snpDocument, func(d *Document) { d.Confidential.SNP.CBitPosition = 64 }, "cbit_position"},
		"snp physical bits": {snpDocument, func(d *Document) { d.Confidential.SNP.ReducedPhysBits = 0 }, "reduced_phys_bits"},
		"snp host data": {snpDocument, func(d *Document) { d.Confidential.SNP.HostData = make([]byte, 31) },
			"host_data has 31 bytes, not 32"},
		"snp empty host data": {snpDocument, func(d *Document) { d.Confidential.SNP.HostData = []byte{} }, "host_data has 0 bytes"},
		"snp id block alone":  {snpDocument, func(d *Document) { idBlock(d); d.Confidential.SNP.IDAuth = nil }, "belong together"},
		"snp id auth alone":   {snpDocument, func(d *Document) { idBlock(d); d.Confidential.SNP.IDBlock = nil }, "belong together"},
		"snp id block size": {snpDocument, func(d *Document) { idBlock(d); d.Confidential.SNP.IDBlock = make([]byte, 95) },
			"id_block has 95 bytes, not 96"},
		"snp id auth size": {snpDocument, func(d *Document) { idBlock(d); d.Confidential.SNP.IDAuth = make([]byte, 4095) },
			"id_auth has 4095 bytes, not 4096"},
		"snp author key": {snpDocument, func(d *Document) { d.Confidential.SNP.AuthorKey = true }, "author_key"},

		"tdx on s390x": {tdxDocument, func(d *Document) { d.Architecture = ArchS390X }, "is of the architecture amd64"},
		"tdx firmware": {tdxDocument, func(d *Document) { d.Boot.Firmware = "" }, "needs boot.firmware"},
		"tdx mrconfigid": {tdxDocument, func(d *Document) { d.Confidential.TDX.MRConfigID = make([]byte, 32) },
			"mrconfigid has 32 bytes, not 48"},
		"tdx mrowner":       {tdxDocument, func(d *Document) { d.Confidential.TDX.MROwner = make([]byte, 49) }, "mrowner has 49 bytes"},
		"tdx mrownerconfig": {tdxDocument, func(d *Document) { d.Confidential.TDX.MROwnerConfig = []byte{} }, "mrownerconfig has 0 bytes"},
		"quotes from both": {tdxDocument, func(d *Document) { d.Confidential.TDX.QuoteSocket = &QuoteSocket{Path: "/q", Port: 1} },
			"a path and a vsock address"},
		"quotes from none": {tdxDocument, func(d *Document) { d.Confidential.TDX.QuoteSocket = &QuoteSocket{} }, "no vsock address"},
		"quotes, relative": {tdxDocument, func(d *Document) { d.Confidential.TDX.QuoteSocket = &QuoteSocket{Path: "q"} }, "no absolute path"},
		"quotes, long path": {tdxDocument, func(d *Document) {
			d.Confidential.TDX.QuoteSocket = &QuoteSocket{Path: "/" + strings.Repeat("q", 107)}
		}, "at most 107 bytes"},
		"quotes, odd path": {tdxDocument, func(d *Document) { d.Confidential.TDX.QuoteSocket = &QuoteSocket{Path: "/\xff"} }, "UTF-8"},
		"quotes, vsock, any": {tdxDocument, func(d *Document) { d.Confidential.TDX.QuoteSocket = &QuoteSocket{CID: 1<<32 - 1, Port: 1} },
			"no vsock address"},

		"se on amd64":   {seDocument, func(d *Document) { d.Architecture = ArchAMD64 }, "is of the architecture s390x"},
		"se not sealed": {seDocument, func(d *Document) { d.Boot.Sealed, d.Boot.Initrd = false, "/i" }, "needs boot.sealed"},
	} {
		t.Run(name, func(t *testing.T) {
			doc := tc.base()
			tc.change(&doc)
			err := doc.Validate()
			require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
			require.ErrorContains(t, err, tc.says)
		})
	}
}
