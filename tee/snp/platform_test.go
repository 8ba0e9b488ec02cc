// SPDX-License-Identifier: Apache-2.0

package snp

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"

	"github.com/cloister-project/cloister/hypervisor"
	"github.com/cloister-project/cloister/tee"
	"github.com/cloister-project/cloister/tee/firmware"
	"github.com/cloister-project/cloister/tee/firmware/firmwaretest"
	"github.com/cloister-project/cloister/tee/hostprobe"
)

// setup is a platform's configuration and a document, with all the files.
type setup struct {
	config Config
	doc    hypervisor.Document
}

func write(t *testing.T, name string, content []byte) (path, digest string) {
	t.Helper()
	path = filepath.Join(t.TempDir(), name)
	require.NoError(t, os.WriteFile(path, content, 0o600))
	sum := sha256.Sum256(content)
	return path, hex.EncodeToString(sum[:])
}

func bzImage() []byte {
	b := bytes.Repeat([]byte{0x90}, 4096)
	copy(b[0x202:], "HdrS")
	return b
}

func newSetup(t *testing.T) setup {
	t.Helper()
	image, digest := write(t, "OVMF.fd", firmwaretest.SNP().Bytes())
	kernel, _ := write(t, "vmlinuz", bzImage())
	initrd, _ := write(t, "initrd.img", []byte("initrd"))
	return setup{
		config: Config{Firmware: image, Digests: []string{digest}, Policy: uint64(DefaultPolicy), GuestFeatures: 1},
		doc: hypervisor.Document{
			ID: "pod", Architecture: hypervisor.ArchAMD64, Accelerator: hypervisor.AccelKVM,
			CPU:    hypervisor.CPU{Model: "EPYC-v4", Count: 2},
			Memory: hypervisor.Memory{Bytes: 512 << 20},
			Boot:   hypervisor.Boot{Kernel: kernel, Initrd: initrd, Parameters: []string{"console=ttyS0", "quiet"}},
		},
	}
}

func noSEV() (hostprobe.SEVInfo, bool) { return hostprobe.SEVInfo{}, false }

func (s setup) platform(t *testing.T) *Platform {
	t.Helper()
	p, err := New(s.config)
	require.NoError(t, err)
	p.sev = noSEV
	return p
}

// withKeys adds an ID key and an author key.
func (s *setup) withKeys(t *testing.T) {
	t.Helper()
	for number, to := range map[byte]*string{2: &s.config.IDKey, 3: &s.config.AuthorKey} {
		der, err := x509.MarshalPKCS8PrivateKey(fixedKey(t, number))
		require.NoError(t, err)
		*to, _ = write(t, "key.pem", pemOf("PRIVATE KEY", der))
	}
	s.config.FamilyID, s.config.ImageID, s.config.GuestSVN = "00112233445566778899aabbccddeeff", "FFEEDDCCBBAA99887766554433221100", 7
}

func value(t *testing.T, v *tee.ReferenceValues, name string) string {
	t.Helper()
	for _, x := range v.Values {
		if x.Name == name {
			return x.Hex
		}
	}
	require.Failf(t, "missing", "%s in %+v", name, v.Values)
	return ""
}

func TestPrepareAddsThePlatform(t *testing.T) {
	s := newSetup(t)
	p := s.platform(t)
	doc := s.doc
	require.NoError(t, p.Prepare(context.Background(), &doc, tee.Inputs{}))
	want := s.doc
	want.Boot.Firmware = s.config.Firmware
	want.Confidential = &hypervisor.Confidential{Platform: "snp", SNP: &hypervisor.SNP{
		CBitPosition: 51, ReducedPhysBits: 1, Policy: 0x30000, KernelHashes: true,
	}}
	require.Equal(t, want, doc)

	again := doc
	require.NoError(t, p.Prepare(context.Background(), &again, tee.Inputs{}))
	require.Equal(t, doc, again, "the same twice")

	p.sev = func() (hostprobe.SEVInfo, bool) {
		return hostprobe.SEVInfo{SEV: true, CBitPosition: 47, ReducedPhysBits: 5}, true
	}
	require.NoError(t, p.Prepare(context.Background(), &again, tee.Inputs{}))
	require.Equal(t, uint32(47), again.Confidential.SNP.CBitPosition)
	require.Equal(t, uint32(5), again.Confidential.SNP.ReducedPhysBits)
}

func TestPrepareBindsInitdata(t *testing.T) {
	s := newSetup(t)
	for size, want := range map[int]string{
		32: strings.Repeat("ab", 32), 48: strings.Repeat("ab", 32), 20: strings.Repeat("ab", 20) + strings.Repeat("00", 12),
	} {
		doc := s.doc
		require.NoError(t, s.platform(t).Prepare(context.Background(), &doc, tee.Inputs{InitdataDigest: bytes.Repeat([]byte{0xab}, size)}))
		require.Equal(t, want, hex.EncodeToString(doc.Confidential.SNP.HostData), "a digest of %d bytes", size)
	}
}

func TestMeasure(t *testing.T) {
	s := newSetup(t)
	s.withKeys(t)
	p := s.platform(t)
	doc := s.doc
	require.NoError(t, p.Prepare(context.Background(), &doc, tee.Inputs{InitdataDigest: bytes.Repeat([]byte{0xcd}, 32)}))
	v, err := p.Measure(context.Background(), doc)
	require.NoError(t, err)

	kernel := sha256.Sum256(bzImage())
	initrd := sha256.Sum256([]byte("initrd"))
	want, err := Launch{
		Firmware: firmwaretest.SNP().Bytes(), CPUSignature: 0x800f12, GuestFeatures: 1,
		Hashes: &Hashes{Parameters: sha256.Sum256([]byte("console=ttyS0 quiet\x00")), Initrd: initrd, Kernel: kernel},
	}.Digest(2)
	require.NoError(t, err)
	require.Equal(t, tee.SNP, v.Platform)
	require.Equal(t, 2, v.VCPUs)
	require.Equal(t, "EPYC-v4", v.CPUModel)
	require.Equal(t, "console=ttyS0 quiet", v.Parameters)
	require.Equal(t, hex.EncodeToString(want[:]), value(t, v, "snp.launch_digest"))
	require.Equal(t, strings.Repeat("cd", 32), value(t, v, "snp.host_data"))
	require.Equal(t, "0000030000000000", value(t, v, "snp.policy"))
	require.Equal(t, []tee.Input{
		{Role: "firmware", Path: s.config.Firmware, SHA256: s.config.Digests[0]},
		{Role: "kernel", Path: s.doc.Boot.Kernel, SHA256: hex.EncodeToString(kernel[:])},
		{Role: "initrd", Path: s.doc.Boot.Initrd, SHA256: hex.EncodeToString(initrd[:])},
	}, v.Inputs)

	// What is signed is what is measured.
	snp := doc.Confidential.SNP
	require.True(t, snp.AuthorKey)
	signed, err := VerifyIDBlock(snp.IDBlock, snp.IDAuth, true)
	require.NoError(t, err)
	require.Equal(t, want, signed.Identity.Digest)
	require.Equal(t, uint32(7), signed.Identity.GuestSVN)
	require.Equal(t, "00112233445566778899aabbccddeeff", hex.EncodeToString(signed.Identity.FamilyID[:]))
	require.Equal(t, "ffeeddccbbaa99887766554433221100", hex.EncodeToString(signed.Identity.ImageID[:]))
	require.Equal(t, Policy(0x30000), signed.Identity.Policy)
	require.Equal(t, hex.EncodeToString(signed.IDKeyDigest[:]), value(t, v, "snp.id_key_digest"))
	require.Equal(t, hex.EncodeToString(signed.AuthorKeyDigest[:]), value(t, v, "snp.author_key_digest"))

	all, err := p.MeasureRange(context.Background(), doc, 1, 64)
	require.NoError(t, err)
	require.Len(t, all, 64)
	require.Equal(t, v, all[1])
	seen := map[string]bool{}
	for i, r := range all {
		require.Equal(t, i+1, r.VCPUs)
		seen[value(t, r, "snp.launch_digest")] = true
	}
	require.Len(t, seen, 64, "each number of virtual CPUs has a digest of its own")
}

func TestMeasureWithoutInitrdAndInitdata(t *testing.T) {
	s := newSetup(t)
	s.doc.Boot.Initrd = ""
	p := s.platform(t)
	require.NoError(t, p.Prepare(context.Background(), &s.doc, tee.Inputs{}))
	v, err := p.Measure(context.Background(), s.doc)
	require.NoError(t, err)
	want, err := Launch{Firmware: firmwaretest.SNP().Bytes(), CPUSignature: 0x800f12, GuestFeatures: 1,
		Hashes: &Hashes{Parameters: HashParameters("console=ttyS0 quiet"), Initrd: sha256.Sum256(nil),
			Kernel: sha256.Sum256(bzImage())}}.Digest(2)
	require.NoError(t, err)
	require.Equal(t, hex.EncodeToString(want[:]), value(t, v, "snp.launch_digest"))
	require.Len(t, v.Values, 3, "launch digest, host data and policy")
	require.Equal(t, strings.Repeat("00", 32), value(t, v, "snp.host_data"), "no initdata is a statement, too")
	require.Len(t, v.Inputs, 2)
}

func TestMeasureFollowsEachInput(t *testing.T) {
	measure := func(change func(*setup)) string {
		s := newSetup(t)
		change(&s)
		p := s.platform(t)
		require.NoError(t, p.Prepare(context.Background(), &s.doc, tee.Inputs{}))
		v, err := p.Measure(context.Background(), s.doc)
		require.NoError(t, err)
		return value(t, v, "snp.launch_digest")
	}
	want := measure(func(*setup) {})
	require.Equal(t, want, measure(func(s *setup) { s.doc.Memory.Bytes *= 2; s.doc.ID = "other" }), "what is not measured")
	for name, change := range map[string]func(*setup){
		"kernel": func(s *setup) { flipFile(t, s.doc.Boot.Kernel) },
		"initrd": func(s *setup) { flipFile(t, s.doc.Boot.Initrd) },
		"firmware": func(s *setup) {
			flipFile(t, s.config.Firmware)
			_, digest, err := firmware.ReadFile(s.config.Firmware, firmware.MaxSize)
			require.NoError(t, err)
			s.config.Digests = []string{digest}
		},
		"parameter":         func(s *setup) { s.doc.Boot.Parameters[1] = "quieu" },
		"order":             func(s *setup) { s.doc.Boot.Parameters = []string{"quiet", "console=ttyS0"} },
		"parameter's space": func(s *setup) { s.doc.Boot.Parameters = append(s.doc.Boot.Parameters, "") },
		"CPU model":         func(s *setup) { s.doc.CPU.Model = "EPYC-Milan-v2" },
		"CPUs":              func(s *setup) { s.doc.CPU.Count = 3 },
		"guest features":    func(s *setup) { s.config.GuestFeatures = 0x21 },
	} {
		require.NotEqual(t, want, measure(change), name)
	}
}

// flipFile changes one bit of a file's first byte.
func flipFile(t *testing.T, path string) {
	t.Helper()
	raw, err := os.ReadFile(path)
	require.NoError(t, err)
	raw[0] ^= 1
	require.NoError(t, os.WriteFile(path, raw, 0o600))
}

func TestPrepareRefusesDocuments(t *testing.T) {
	for _, tt := range []struct {
		want   string
		change func(*hypervisor.Document)
	}{
		{"of the architecture amd64, and the VM is for s390x", func(d *hypervisor.Document) { d.Architecture = hypervisor.ArchS390X }},
		{`accelerator "tcg": only KVM`, func(d *hypervisor.Document) { d.Accelerator = hypervisor.AccelTCG }},
		{`CPU model "host" depends on the machine`, func(d *hypervisor.Document) { d.CPU.Model = "host" }},
		{`CPU model "max" depends on the machine`, func(d *hypervisor.Document) { d.CPU.Model = "max" }},
		{`CPU model "" depends on the machine`, func(d *hypervisor.Document) { d.CPU.Model = "" }},
		{"known are EPYC, EPYC-Genoa, EPYC-Genoa-v1", func(d *hypervisor.Document) { d.CPU.Model = "qemu64" }},
		{"0 virtual CPUs", func(d *hypervisor.Document) { d.CPU.Count = 0 }},
		{"1025 virtual CPUs", func(d *hypervisor.Document) { d.CPU.Count = 1025 }},
		{"sealed for another platform", func(d *hypervisor.Document) { d.Boot.Sealed = true }},
		{"boot.kernel is not given", func(d *hypervisor.Document) { d.Boot.Kernel = "" }},
		{"shared directories", func(d *hypervisor.Document) { d.SharedDirectories = 1 }},
		{"prepared for tdx already", func(d *hypervisor.Document) {
			d.Confidential = &hypervisor.Confidential{Platform: "tdx", TDX: &hypervisor.TDX{}}
		}},
	} {
		s := newSetup(t)
		tt.change(&s.doc)
		before := s.doc
		err := s.platform(t).Prepare(context.Background(), &s.doc, tee.Inputs{})
		require.ErrorContains(t, err, tt.want)
		require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
		require.Equal(t, before, s.doc, "a refused document is left as it was")
	}

	s := newSetup(t)
	s.doc.CPU.Model, s.doc.SharedDirectories, s.config.Digests = "host", 4, nil
	err := s.platform(t).Prepare(context.Background(), &s.doc, tee.Inputs{})
	for _, want := range []string{"host", "shared directories", "firmware_digests"} {
		require.ErrorContains(t, err, want, "all reasons in one")
	}
}

func TestPrepareRefusesFirmware(t *testing.T) {
	for _, tt := range []struct {
		name, want string
		change     func(*setup)
		kind       error
	}{
		{"not on the list", "none of the 1 accepted ones", func(s *setup) { s.config.Digests = []string{strings.Repeat("00", 32)} },
			errdefs.ErrInvalidArgument},
		{"empty list", "since tee.snp.firmware_digests is empty", func(s *setup) { s.config.Digests = nil }, errdefs.ErrInvalidArgument},
		{"without kernel hashes", "no section KERNEL_HASHES", func(s *setup) {
			image := firmwaretest.SNP()
			image.SNP = image.SNP[:5]
			s.config.Firmware, s.config.Digests[0] = write(t, "OVMF.fd", image.Bytes())
		}, errdefs.ErrInvalidArgument},
		{"without hash table", "no entry for a hash table", func(s *setup) {
			image := firmwaretest.SNP()
			image.HashTable = nil
			s.config.Firmware, s.config.Digests[0] = write(t, "OVMF.fd", image.Bytes())
		}, errdefs.ErrInvalidArgument},
		{"no firmware at all", "malformed", func(s *setup) { s.config.Firmware, s.config.Digests[0] = write(t, "OVMF.fd", bzImage()) },
			errdefs.ErrInvalidArgument},
		{"missing", "no such file", func(s *setup) { s.config.Firmware = "/nonexistent/OVMF.fd" }, os.ErrNotExist},
		{"no descriptor", "install a build of edk2's OvmfPkg/AmdSev",
			func(s *setup) { s.config.Firmware, s.config.Descriptors = "", []string{t.TempDir()} }, errdefs.ErrNotFound},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := newSetup(t)
			tt.change(&s)
			err := s.platform(t).Prepare(context.Background(), &s.doc, tee.Inputs{})
			require.ErrorContains(t, err, tt.want)
			require.ErrorIs(t, err, tt.kind)
			require.Nil(t, s.doc.Confidential)
		})
	}

	s := newSetup(t)
	digest := s.config.Digests[0]
	s.config.Digests = nil
	err := s.platform(t).Prepare(context.Background(), &s.doc, tee.Inputs{})
	require.ErrorContains(t, err, digest, "the digest that was found")
	require.ErrorContains(t, err, "boots any kernel without comparing", "the reason")
	require.ErrorContains(t, err, "OvmfPkg/AmdSev", "what to check before it is added")
}

// TestOrdinaryOVMFIsRefused with a real one.
func TestOrdinaryOVMFIsRefused(t *testing.T) {
	s := newSetup(t)
	s.config.Firmware = testFile(t, "CLOISTER_TEST_OVMF")
	require.ErrorIs(t, s.platform(t).Prepare(context.Background(), &s.doc, tee.Inputs{}), errdefs.ErrInvalidArgument)
}

func TestFirmwareIsFoundByDescriptor(t *testing.T) {
	s := newSetup(t)
	image := s.config.Firmware
	dir := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(dir, "60.json"), fmt.Appendf(nil, `{"mapping": {"device": "memory", "filename": %q},
		"targets": [{"architecture": "x86_64", "machines": ["pc-q35-*"]}], "features": ["amd-sev-snp"]}`, image), 0o600))
	s.config.Firmware, s.config.Descriptors = "", []string{dir}
	require.NoError(t, s.platform(t).Prepare(context.Background(), &s.doc, tee.Inputs{}))
	require.Equal(t, image, s.doc.Boot.Firmware)
}

func TestPrepareNeedsItsKeys(t *testing.T) {
	s := newSetup(t)
	s.withKeys(t)
	require.NoError(t, os.Remove(s.config.AuthorKey))
	err := s.platform(t).Prepare(context.Background(), &s.doc, tee.Inputs{})
	require.ErrorContains(t, err, "tee.snp.author_key")
	require.ErrorIs(t, err, os.ErrNotExist)
	require.NoError(t, os.WriteFile(s.config.IDKey, []byte("no key"), 0o600))
	require.ErrorContains(t, s.platform(t).Prepare(context.Background(), &s.doc, tee.Inputs{}), "tee.snp.id_key")
	require.Nil(t, s.doc.Confidential)
}

func TestMeasureRefuses(t *testing.T) {
	s := newSetup(t)
	s.withKeys(t)
	p := s.platform(t)
	_, err := p.Measure(context.Background(), s.doc)
	require.ErrorContains(t, err, "not prepared for SEV-SNP")
	require.NoError(t, p.Prepare(context.Background(), &s.doc, tee.Inputs{}))

	_, err = p.MeasureRange(context.Background(), s.doc, 0, 4)
	require.ErrorIs(t, err, errdefs.ErrInvalidArgument)

	other := s.doc
	other.CPU.Count = 3
	_, err = p.Measure(context.Background(), other)
	require.ErrorContains(t, err, "the ID block is of another launch")
	require.ErrorIs(t, err, errdefs.ErrFailedPrecondition)

	forged := *s.doc.Confidential.SNP
	forged.IDBlock = bytes.Clone(forged.IDBlock)
	forged.IDBlock[0] ^= 1
	other = s.doc
	other.Confidential = &hypervisor.Confidential{Platform: "snp", SNP: &forged}
	_, err = p.Measure(context.Background(), other)
	require.ErrorContains(t, err, "the signature does not fit")

	canceled, cancel := context.WithCancel(context.Background())
	cancel()
	_, err = p.Measure(canceled, s.doc)
	require.ErrorIs(t, err, context.Canceled)

	require.NoError(t, os.WriteFile(s.doc.Boot.Kernel, bytes.Repeat([]byte("\x7fELF"), 1024), 0o600))
	_, err = p.Measure(context.Background(), s.doc)
	require.ErrorContains(t, err, "is no bzImage")
}

func TestNewRefuses(t *testing.T) {
	valid := Config{Policy: uint64(DefaultPolicy), GuestFeatures: 1}
	p, err := New(valid)
	require.NoError(t, err)
	require.Equal(t, tee.SNP, p.Name())
	for _, tt := range []struct {
		want   string
		change func(*Config)
	}{
		{`tee.snp.firmware: "OVMF.fd" is not an absolute path`, func(c *Config) { c.Firmware = "OVMF.fd" }},
		{`tee.firmware_descriptors: "x"`, func(c *Config) { c.Descriptors = []string{"/ok", "x"} }},
		{`tee.snp.id_key: "k"`, func(c *Config) { c.IDKey = "k" }},
		{"is not a SHA-256 digest", func(c *Config) { c.Digests = []string{strings.Repeat("0", 62)} }},
		{"is not a SHA-256 digest", func(c *Config) { c.Digests = []string{strings.Repeat("x", 64)} }},
		{"bit 17 is not set", func(c *Config) { c.Policy = 0x10000 }},
		{"bit 19 (debug) lets the host read", func(c *Config) { c.Policy |= uint64(PolicyDebug) }},
		{"bit 18 allows a migration agent", func(c *Config) { c.Policy |= uint64(PolicyMigrateMA); c.AllowDebug = true }},
		{"bits 0x8000000000000000 are reserved", func(c *Config) { c.Policy |= 1 << 63 }},
		{"guest_features: 0x20", func(c *Config) { c.GuestFeatures = 0x20 }},
		{"guest_features: 0x10001", func(c *Config) { c.GuestFeatures = 0x10001 }},
		{"without tee.snp.id_key, the key that it signs", func(c *Config) { c.AuthorKey = "/k" }},
		{"tee.snp.family_id: is part of the ID block", func(c *Config) { c.FamilyID = strings.Repeat("00", 16) }},
		{`tee.snp.image_id: "00" is not 32`, func(c *Config) { c.IDKey, c.ImageID = "/k", "00" }},
		{"tee.snp.guest_svn: -1", func(c *Config) { c.GuestSVN = -1 }},
		{"tee.snp.guest_svn: 4294967296", func(c *Config) { c.GuestSVN = 1 << 32 }},
		{"tee.snp.guest_svn: is part of the ID block", func(c *Config) { c.GuestSVN = 1 }},
	} {
		c := valid
		tt.change(&c)
		p, err := New(c)
		require.ErrorContains(t, err, tt.want)
		require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
		require.Nil(t, p)
	}
	c := valid
	c.Policy, c.AllowDebug = c.Policy|uint64(PolicyDebug), true
	_, err = New(c)
	require.NoError(t, err, "a debug policy that is asked for twice")

	_, err = New(Config{Firmware: "x", Digests: []string{"y"}})
	for _, want := range []string{"tee.snp.firmware: ", "tee.snp.firmware_digests", "tee.snp.policy", "guest_features"} {
		require.ErrorContains(t, err, want, "all faults in one")
	}
}

func TestDigestsInCapitalsAreAccepted(t *testing.T) {
	s := newSetup(t)
	s.config.Digests[0] = strings.ToUpper(s.config.Digests[0])
	require.NoError(t, s.platform(t).Prepare(context.Background(), &s.doc, tee.Inputs{}))
}

func TestPolicyIsReadable(t *testing.T) {
	require.Equal(t, "0x30000 (smt, abi>=0.0)", DefaultPolicy.String())
	require.Equal(t, "0x1b0137 (smt, debug, single-socket, abi>=1.55)", (DefaultPolicy | PolicyDebug | PolicySingleSocket | 0x137).String())
	for bit := range 26 {
		faults := (DefaultPolicy | 1<<bit).Faults(true)
		require.Equal(t, bit == 18, len(faults) > 0, "bit %d", bit)
	}
}
