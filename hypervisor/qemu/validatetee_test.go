// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"encoding/binary"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"

	"github.com/cloister-project/cloister/hypervisor"
	"github.com/cloister-project/cloister/tee"
	"github.com/cloister-project/cloister/tee/abi"
)

func TestPlatformNames(t *testing.T) {
	require.Equal(t, []string{string(tee.Sample), string(tee.SNP), string(tee.TDX), string(tee.SE)},
		[]string{platformSample, platformSNP, platformTDX, platformSE})
}

func TestValidateConfidential(t *testing.T) {
	type document = hypervisor.Document
	idBlock := func(d *document) {
		s := d.Confidential.SNP
		s.IDBlock, s.IDAuth = make([]byte, abi.SNPIDBlockSize), make([]byte, abi.SNPIDAuthSize)
		binary.LittleEndian.PutUint64(s.IDBlock[idBlockPolicy:], s.Policy)
	}
	for _, doc := range []document{confidentialDocument(), snpDocument(), tdxDocument(), s390xDocument(), seDocument()} {
		require.NoError(t, Validate(doc))
	}
	for name, tc := range map[string]struct {
		base   func() document
		change func(*document)
		says   string
	}{
		"architecture":           {goldenDocument, func(d *document) { d.Architecture = "riscv64" }, "architecture"},
		"relative firmware":      {goldenDocument, func(d *document) { d.Boot.Firmware = "OVMF.fd" }, "boot.firmware"},
		"sealed on amd64":        {goldenDocument, func(d *document) { d.Boot = hypervisor.Boot{Kernel: "/k", Sealed: true} }, "boot.sealed is for s390x"},
		"s390x firmware":         {s390xDocument, func(d *document) { d.Boot.Firmware = "/f" }, "boot.firmware is for amd64"},
		"s390x shared folders":   {s390xDocument, func(d *document) { d.SharedFolderPorts = 1 }, "shared_folder_ports is for amd64"},
		"sealed with initrd":     {seDocument, func(d *document) { d.Boot.Initrd = "/i" }, "in the sealed image"},
		"sealed with parameters": {seDocument, func(d *document) { d.Boot.Parameters = []string{"quiet"} }, "in the sealed image"},

		"shared folders":    {confidentialDocument, func(d *document) { d.SharedFolderPorts = 1 }, "no shared folders"},
		"no platform":       {confidentialDocument, func(d *document) { d.Confidential.Platform = "" }, "is not known"},
		"unknown platform":  {confidentialDocument, func(d *document) { d.Confidential.Platform = "sev" }, "is not known"},
		"platform, no part": {confidentialDocument, func(d *document) { d.Confidential.Platform = platformSNP }, "nothing would protect"},
		"part, no platform": {snpDocument, func(d *document) { d.Confidential.Platform = platformSample }, "another platform's part"},
		"two platforms":     {snpDocument, func(d *document) { d.Confidential.TDX = &hypervisor.TDX{} }, "more than one platform"},
		"emulated":          {snpDocument, func(d *document) { d.Accelerator = hypervisor.AccelTCG }, "only KVM"},

		"snp on s390x":        {snpDocument, func(d *document) { d.Architecture = hypervisor.ArchS390X }, "confidential.snp is for amd64"},
		"snp firmware":        {snpDocument, func(d *document) { d.Boot.Firmware = "" }, "needs boot.firmware"},
		"snp kernel hashes":   {snpDocument, func(d *document) { d.Confidential.SNP.KernelHashes = false }, "kernel_hashes must be set"},
		"snp C-bit":           {snpDocument, func(d *document) { d.Confidential.SNP.CBitPosition = 64 }, "cbit_position"},
		"snp physical bits":   {snpDocument, func(d *document) { d.Confidential.SNP.ReducedPhysBits = 0 }, "reduced_phys_bits"},
		"snp policy":          {snpDocument, func(d *document) { d.Confidential.SNP.Policy = 0x10000 }, "bit 17"},
		"snp host data":       {snpDocument, func(d *document) { d.Confidential.SNP.HostData = make([]byte, 31) }, "host_data has 31 bytes, not 32"},
		"snp empty host data": {snpDocument, func(d *document) { d.Confidential.SNP.HostData = []byte{} }, "host_data has 0 bytes"},
		"snp id block alone":  {snpDocument, func(d *document) { idBlock(d); d.Confidential.SNP.IDAuth = nil }, "belong together"},
		"snp id auth alone":   {snpDocument, func(d *document) { idBlock(d); d.Confidential.SNP.IDBlock = nil }, "belong together"},
		"snp id block size":   {snpDocument, func(d *document) { idBlock(d); d.Confidential.SNP.IDBlock = make([]byte, 95) }, "id_block has 95 bytes, not 96"},
		"snp id auth size":    {snpDocument, func(d *document) { idBlock(d); d.Confidential.SNP.IDAuth = make([]byte, 4095) }, "id_auth has 4095 bytes, not 4096"},
		"snp id block policy": {snpDocument, func(d *document) { idBlock(d); d.Confidential.SNP.Policy |= 1 << 19 }, "the firmware would refuse"},
		"snp author key":      {snpDocument, func(d *document) { d.Confidential.SNP.AuthorKey = true }, "author_key"},
		"snp CPU model":       {snpDocument, func(d *document) { d.CPU.Model = "host,+x2apic" }, "not a fixed one"},

		"tdx on s390x":      {tdxDocument, func(d *document) { d.Architecture = hypervisor.ArchS390X }, "confidential.tdx is for amd64"},
		"tdx firmware":      {tdxDocument, func(d *document) { d.Boot.Firmware = "" }, "needs boot.firmware"},
		"tdx CPU model":     {tdxDocument, func(d *document) { d.CPU.Model = "EPYC-v4" }, "no other model than host"},
		"tdx attributes":    {tdxDocument, func(d *document) { d.Confidential.TDX.Attributes = 1 }, "SEPT_VE_DISABLE"},
		"tdx mrconfigid":    {tdxDocument, func(d *document) { d.Confidential.TDX.MRConfigID = make([]byte, 32) }, "mrconfigid has 32 bytes, not 48"},
		"tdx mrowner":       {tdxDocument, func(d *document) { d.Confidential.TDX.MROwner = make([]byte, 49) }, "mrowner has 49 bytes"},
		"tdx mrownerconfig": {tdxDocument, func(d *document) { d.Confidential.TDX.MROwnerConfig = []byte{} }, "mrownerconfig has 0 bytes"},
		"quotes from both":  {tdxDocument, func(d *document) { d.Confidential.TDX.QuoteSocket = &hypervisor.QuoteSocket{Path: "/q", Port: 1} }, "a path and a vsock address"},
		"quotes from none":  {tdxDocument, func(d *document) { d.Confidential.TDX.QuoteSocket = &hypervisor.QuoteSocket{} }, "no vsock address"},
		"quotes, relative":  {tdxDocument, func(d *document) { d.Confidential.TDX.QuoteSocket = &hypervisor.QuoteSocket{Path: "q"} }, "no absolute path"},
		"quotes, long path": {tdxDocument, func(d *document) {
			d.Confidential.TDX.QuoteSocket = &hypervisor.QuoteSocket{Path: "/" + strings.Repeat("q", 107)}
		}, "at most 107 bytes"},
		"quotes, odd path":   {tdxDocument, func(d *document) { d.Confidential.TDX.QuoteSocket = &hypervisor.QuoteSocket{Path: "/\xff"} }, "UTF-8"},
		"quotes, vsock, any": {tdxDocument, func(d *document) { d.Confidential.TDX.QuoteSocket = &hypervisor.QuoteSocket{CID: 1<<32 - 1, Port: 1} }, "no vsock address"},

		"se on amd64":          {seDocument, func(d *document) { d.Architecture = hypervisor.ArchAMD64 }, "secure_execution is for s390x"},
		"se not sealed":        {seDocument, func(d *document) { d.Boot.Sealed, d.Boot.Initrd = false, "/i" }, "needs boot.sealed"},
		"se CPU model":         {seDocument, func(d *document) { d.CPU.Model = "z16" }, "unpack facility"},
		"se without ccw vsock": {seDocument, func(d *document) { d.Vsock.Kind, d.Memory.Shared = hypervisor.VsockVhostUser, true }, "load the module vhost_vsock"},
	} {
		t.Run(name, func(t *testing.T) {
			doc := tc.base()
			tc.change(&doc)
			err := Validate(doc)
			require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
			require.ErrorContains(t, err, tc.says)
		})
	}
}

// A property that the binary does not have is named, and never left out.
func TestMissingTEEProperties(t *testing.T) {
	full := goldenCases()["snp-full"].doc
	var missing *Missing

	f := debianFeatures()
	f.Objects[typeSNP] = slices.DeleteFunc(f.Objects[typeSNP], func(p string) bool { return p == "host-data" || p == "id-block" })
	_, err := NewCommandLine(full, f, nil)
	require.ErrorAs(t, err, &missing)
	require.Equal(t, []string{"sev-snp-guest.host-data", "sev-snp-guest.id-block"}, missing.What)
	_, err = NewCommandLine(snpDocument(), f, nil)
	require.NoError(t, err, "a document that does not need them")

	_, err = NewCommandLine(tdxDocument(), debianFeatures(), nil)
	require.ErrorAs(t, err, &missing)
	require.Equal(t, []string{"tdx-guest"}, missing.What)

	f = s390xFeatures()
	f.Types = []string{"kvm-accel"}
	_, err = NewCommandLine(seDocument(), f, nil)
	require.ErrorAs(t, err, &missing)
	require.Equal(t, []string{"sclpconsole", "virtio-scsi-ccw", "scsi-hd", "vhost-vsock-ccw", "virtio-net-ccw", typeSE}, missing.What)

	// A QEMU of another architecture is no QEMU that lacks something.
	_, err = NewCommandLine(s390xDocument(), debianFeatures(), nil)
	require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
	require.ErrorContains(t, err, "the VM is for s390x and this QEMU for amd64")
}

func TestBootFiles(t *testing.T) {
	dir := t.TempDir()
	file := func(name string, content []byte) string {
		path := filepath.Join(dir, name)
		require.NoError(t, os.WriteFile(path, content, 0o600))
		return path
	}
	raw := func(limit uint64) []byte {
		b := make([]byte, s390HeaderEnd)
		copy(b[s390MagicOffset:], s390Magic)
		binary.BigEndian.PutUint64(b[s390CommandLineOffset:], limit)
		return b
	}
	elf, err := os.ReadFile("/proc/self/exe")
	require.NoError(t, err)
	initrd, empty := file("initrd", []byte("x")), file("empty", nil)
	for name, tc := range map[string]struct {
		boot hypervisor.Boot
		says string
	}{
		"old kernel":              {hypervisor.Boot{Kernel: file("old", raw(0)), Initrd: initrd, Parameters: []string{strings.Repeat("x", 895)}}, ""},
		"old kernel, too long":    {hypervisor.Boot{Kernel: file("old2", raw(0)), Initrd: initrd, Parameters: []string{strings.Repeat("x", 896)}}, "896 bytes, the kernel takes 895"},
		"kernel":                  {hypervisor.Boot{Kernel: file("new", raw(4096)), Initrd: initrd, Parameters: []string{strings.Repeat("x", 4095)}}, ""},
		"kernel, too long":        {hypervisor.Boot{Kernel: file("new2", raw(4096)), Initrd: initrd, Parameters: []string{strings.Repeat("x", 4096)}}, "the kernel takes 4095"},
		"kernel, damaged":         {hypervisor.Boot{Kernel: file("damaged", raw(1<<40)), Initrd: initrd}, "damaged"},
		"kernel of another kind":  {hypervisor.Boot{Kernel: file("elf", elf), Initrd: initrd}, "no raw s390x kernel"},
		"kernel, short":           {hypervisor.Boot{Kernel: file("short", raw(0)[:100]), Initrd: initrd}, "no raw s390x kernel"},
		"kernel, empty":           {hypervisor.Boot{Kernel: empty, Initrd: initrd}, "no raw s390x kernel"},
		"kernel is a folder":      {hypervisor.Boot{Kernel: dir, Initrd: initrd}, "no regular file"},
		"sealed":                  {hypervisor.Boot{Kernel: initrd, Sealed: true}, ""},
		"sealed, empty":           {hypervisor.Boot{Kernel: empty, Sealed: true}, "boot.kernel: " + empty},
		"sealed, missing":         {hypervisor.Boot{Kernel: dir + "/none", Sealed: true}, "no such file"},
		"initrd, empty, and both": {hypervisor.Boot{Kernel: file("k", raw(0)), Initrd: empty, Firmware: empty}, "boot.firmware"},
	} {
		t.Run(name, func(t *testing.T) {
			var f faults
			f.bootFiles(hypervisor.Document{Architecture: hypervisor.ArchS390X, Boot: tc.boot})
			if tc.says == "" {
				require.NoError(t, f.err())
			} else {
				require.ErrorContains(t, f.err(), tc.says)
			}
		})
	}
}

// With firmware the kernel is the file that the firmware starts and measures, not the ELF file out of it.
func TestFirmwareNeedsBzImage(t *testing.T) {
	kernel := testKernel(t)
	var f faults
	f.bootFiles(hypervisor.Document{Boot: hypervisor.Boot{Kernel: kernel, Initrd: kernel}})
	require.NoError(t, f.err())
	f.bootFiles(hypervisor.Document{Boot: hypervisor.Boot{Kernel: kernel, Initrd: kernel, Firmware: kernel}})
	require.ErrorContains(t, f.err(), "give it the bzImage")
}
