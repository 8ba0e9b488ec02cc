// SPDX-License-Identifier: Apache-2.0

package tdx

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"github.com/ulikunitz/xz/lzma"

	"github.com/cloister-project/cloister/hypervisor"
	"github.com/cloister-project/cloister/tee"
	"github.com/cloister-project/cloister/tee/firmware"
	"github.com/cloister-project/cloister/tee/firmware/firmwaretest"
)

// Traces of the builds that are told apart.
const (
	driversOld   = "T\x00d\x00T\x00c\x00g\x002\x00D\x00x\x00e\x00\x00\x00ACPI DATA\x00 initrd=initrd\x00kernel \x00etc/boot/\x00"
	driversNew   = "T\x00d\x00T\x00c\x00g\x002\x00D\x00x\x00e\x00\x00\x00ACPI DATA\x00initrd=initrd \x00etc/boot/\x00QEMU FW CFG\x00"
	driversParts = "T\x00d\x00T\x00c\x00g\x002\x00D\x00x\x00e\x00\x00\x00ACPI DATA\x00 initrd=initrd\x00etc/boot-menu-wait\x00"
	driversPlain = "ACPI DATA\x00 initrd=initrd\x00"
)

const (
	testPages  = 24
	testVolume = 4 * firmware.PageSize
)

// compress makes the section that OVMF keeps its drivers in.
func compress(t testing.TB, content string) []byte {
	t.Helper()
	var b bytes.Buffer
	w, err := lzma.WriterConfig{Size: int64(len(content)), SizeInHeader: true, DictCap: 1 << 16}.NewWriter(&b)
	require.NoError(t, err)
	_, err = w.Write([]byte(content))
	require.NoError(t, err)
	require.NoError(t, w.Close())
	section := append([]byte{0, 0, 0, 2}, lzmaSection[:]...)
	section = binary.LittleEndian.AppendUint16(section, sectionHeaderSize+guidedDataOffset+4)
	section = append(section, 1, 0)
	return append(section, b.Bytes()...)
}

func testSections() []firmware.TDXSection {
	size := uint32(testPages * firmware.PageSize)
	return []firmware.TDXSection{
		{DataOffset: testVolume, RawSize: size - testVolume, MemAddress: 1<<32 - uint64(size) + testVolume, MemSize: uint64(size) - testVolume,
			Type: firmware.TDXBootFirmware, Attributes: firmware.TDXExtend},
		{RawSize: testVolume, MemAddress: 1<<32 - uint64(size), MemSize: testVolume, Type: firmware.TDXConfiguration},
		{MemAddress: 0x810000, MemSize: 0x10000, Type: firmware.TDXTemporaryMemory},
		{MemAddress: 0x809000, MemSize: 0x2000, Type: firmware.TDXHandOff},
	}
}

// writeFirmware makes an image with these drivers; its digest is given too.
func writeFirmware(t *testing.T, drivers string, sections []firmware.TDXSection) (path, digest string) {
	t.Helper()
	raw := firmwaretest.Image{Pages: testPages, TDX: sections}.Bytes()
	copy(raw, bytes.Repeat([]byte{0xff}, testVolume))
	if drivers != "" {
		copy(raw[testVolume+64:], compress(t, drivers))
	}
	path = filepath.Join(t.TempDir(), "OVMF.fd")
	require.NoError(t, os.WriteFile(path, raw, 0o644))
	_, digest, err := firmware.ReadFile(path, firmware.MaxSize)
	require.NoError(t, err)
	return path, digest
}

func testConfig(t *testing.T, drivers string) Config {
	path, digest := writeFirmware(t, drivers, testSections())
	return Config{Firmware: path, Digests: []string{strings.ToUpper(digest)}, Attributes: DefaultAttributes}
}

func testDocument(t *testing.T) hypervisor.Document {
	t.Helper()
	dir := t.TempDir()
	kernel, initrd := filepath.Join(dir, "vmlinuz"), filepath.Join(dir, "initrd")
	require.NoError(t, os.WriteFile(kernel, testPE(nil), 0o644))
	require.NoError(t, os.WriteFile(initrd, []byte("initrd"), 0o644))
	return hypervisor.Document{
		Architecture: hypervisor.ArchAMD64, Accelerator: hypervisor.AccelKVM,
		CPU: hypervisor.CPU{Model: "host", Count: 2}, Memory: hypervisor.Memory{Bytes: 1 << 30},
		Boot: hypervisor.Boot{Kernel: kernel, Initrd: initrd, Parameters: []string{"quiet", "cloister.tee=tdx"}},
	}
}

func mustNew(t *testing.T, cfg Config) *Platform {
	t.Helper()
	p, err := New(cfg)
	require.NoError(t, err)
	require.Equal(t, tee.TDX, p.Name())
	return p
}

func TestNewChecksTheConfiguration(t *testing.T) {
	good := Config{
		Firmware: "/fw", Digests: []string{strings.Repeat("a", 64)}, Attributes: DefaultAttributes | AttributePKS,
		QuoteSocket: "unix:/run/qgs", MROwner: strings.Repeat("0a", 48), MROwnerConfig: strings.Repeat("FF", 48), ACPI: "/acpi",
	}
	p := mustNew(t, good)
	require.Equal(t, &hypervisor.QuoteSocket{Path: "/run/qgs"}, p.quoteSocket)
	require.Equal(t, bytes.Repeat([]byte{10}, 48), p.mrOwner)
	require.Equal(t, bytes.Repeat([]byte{255}, 48), p.mrOwnerConfig)
	good.QuoteSocket = "vsock:2:4050"
	require.Equal(t, &hypervisor.QuoteSocket{CID: 2, Port: 4050}, mustNew(t, good).quoteSocket)
	good.Attributes, good.AllowDebug = DefaultAttributes|AttributeDebug, true
	mustNew(t, good)

	for want, change := range map[string]func(c *Config){
		"bit 0 (DEBUG)":                                    func(c *Config) { c.Attributes |= AttributeDebug },
		"bit 28 (SEPT_VE_DISABLE) is missing":              func(c *Config) { c.Attributes = 0 },
		"bit 29 is refused (MIGR":                          func(c *Config) { c.Attributes |= 1 << 29 },
		"bit 5 is refused (PERF":                           func(c *Config) { c.Attributes |= 1 << 5 },
		"bit 63 is refused":                                func(c *Config) { c.Attributes |= 1 << 63 },
		"bit 7 is not known":                               func(c *Config) { c.Attributes |= 1 << 7 },
		"bit 40 is not known":                              func(c *Config) { c.Attributes |= 1 << 40 },
		"tee.tdx.firmware: \"fw\" is not an absolute path": func(c *Config) { c.Firmware = "fw" },
		"tee.firmware_descriptors: \"d\"":                  func(c *Config) { c.Descriptors = []string{"/d", "d"} },
		"--acpi: \"acpi\"":                                 func(c *Config) { c.ACPI = "acpi" },
		"tee.tdx.firmware_digests: \"abc\"":                func(c *Config) { c.Digests = []string{"abc"} },
		"tee.tdx.mrowner: \"00\"":                          func(c *Config) { c.MROwner = "00" },
		"tee.tdx.mrownerconfig: \"zz":                      func(c *Config) { c.MROwnerConfig = strings.Repeat("zz", 48) },
		"no known kind":                                    func(c *Config) { c.QuoteSocket = "tcp:1:2" },
		"no absolute path":                                 func(c *Config) { c.QuoteSocket = "unix:qgs" },
		"more than 107 bytes":                              func(c *Config) { c.QuoteSocket = "unix:/" + strings.Repeat("a", 107) },
		"two decimal numbers":                              func(c *Config) { c.QuoteSocket = "vsock:2" },
		"two decimal numbers; ":                            func(c *Config) { c.QuoteSocket = "vsock:2:-1" },
		"nobody can listen on":                             func(c *Config) { c.QuoteSocket = "vsock:1:1" },
		"nobody can listen on; give":                       func(c *Config) { c.QuoteSocket = "vsock:4294967295:1" },
	} {
		c := Config{Firmware: "/fw", Attributes: DefaultAttributes}
		change(&c)
		_, err := New(c)
		require.ErrorIs(t, err, errdefs.ErrInvalidArgument, want)
		require.ErrorContains(t, err, want)
	}
	_, err := New(Config{QuoteSocket: "x", MROwner: "y"})
	for _, all := range []string{"bit 28", "tee.tdx.quote_socket", "tee.tdx.mrowner"} {
		require.ErrorContains(t, err, all, "all faults are told at once")
	}
}

func TestPrepare(t *testing.T) {
	cfg := testConfig(t, driversOld)
	cfg.QuoteSocket, cfg.MROwner = "unix:/run/qgs", strings.Repeat("0a", 48)
	p := mustNew(t, cfg)
	doc := testDocument(t)
	plain := doc
	require.NoError(t, p.Prepare(context.Background(), &doc, tee.Inputs{InitdataDigest: bytes.Repeat([]byte{7}, 32)}))
	want := plain
	want.Boot.Firmware = cfg.Firmware
	want.Confidential = &hypervisor.Confidential{Platform: "tdx", TDX: &hypervisor.TDX{
		Attributes:  DefaultAttributes,
		MRConfigID:  append(bytes.Repeat([]byte{7}, 32), make([]byte, 16)...),
		MROwner:     bytes.Repeat([]byte{10}, 48),
		QuoteSocket: &hypervisor.QuoteSocket{Path: "/run/qgs"},
	}}
	require.Equal(t, want, doc)

	doc = plain
	require.NoError(t, p.Prepare(context.Background(), &doc, tee.Inputs{InitdataDigest: bytes.Repeat([]byte{7}, 64)}))
	require.Equal(t, bytes.Repeat([]byte{7}, 48), doc.Confidential.TDX.MRConfigID, "a longer digest is cut")
	doc = plain
	require.NoError(t, p.Prepare(context.Background(), &doc, tee.Inputs{}))
	require.Nil(t, doc.Confidential.TDX.MRConfigID)
	require.NoError(t, p.Prepare(context.Background(), &doc, tee.Inputs{}), "twice is once")
	doc.Confidential.TDX.MROwner[0], doc.Confidential.TDX.QuoteSocket.Path = 1, "/other"
	again := plain
	require.NoError(t, p.Prepare(context.Background(), &again, tee.Inputs{}))
	require.Equal(t, byte(10), again.Confidential.TDX.MROwner[0], "documents share nothing with the platform")
	require.Equal(t, "/run/qgs", again.Confidential.TDX.QuoteSocket.Path)
}

func TestPrepareRefusesDocuments(t *testing.T) {
	p := mustNew(t, testConfig(t, driversOld))
	for want, change := range map[string]func(d *hypervisor.Document){
		"the VM is for s390x":      func(d *hypervisor.Document) { d.Architecture = hypervisor.ArchS390X },
		"CPU model \"EPYC-v4\"":    func(d *hypervisor.Document) { d.CPU.Model = "EPYC-v4" },
		"CPU model \"max\"":        func(d *hypervisor.Document) { d.CPU.Model = "max" },
		"0 virtual CPUs":           func(d *hypervisor.Document) { d.CPU.Count = 0 },
		"sealed for another":       func(d *hypervisor.Document) { d.Boot.Sealed = true },
		"boot.kernel is not given": func(d *hypervisor.Document) { d.Boot.Kernel = "" },
		"shared_directories 3":     func(d *hypervisor.Document) { d.SharedDirectories = 3 },
		"8388608 bytes of memory":  func(d *hypervisor.Document) { d.Memory.Bytes = 8 << 20 },
		"one of platform \"snp\"": func(d *hypervisor.Document) {
			d.Confidential = &hypervisor.Confidential{Platform: "snp", SNP: &hypervisor.SNP{}}
		},
		"one of platform \"sample\" ": func(d *hypervisor.Document) { d.Confidential = &hypervisor.Confidential{Platform: "sample"} },
	} {
		doc := testDocument(t)
		change(&doc)
		before, err := json.Marshal(doc)
		require.NoError(t, err)
		err = p.Prepare(context.Background(), &doc, tee.Inputs{})
		require.ErrorIs(t, err, errdefs.ErrInvalidArgument, want)
		require.ErrorContains(t, err, want)
		after, err := json.Marshal(doc)
		require.NoError(t, err)
		require.JSONEq(t, string(before), string(after), "a refused document stays as it was")
	}
	doc := testDocument(t)
	doc.CPU.Model, doc.SharedDirectories = "max", 1
	err := mustNew(t, Config{Firmware: "/none", Attributes: DefaultAttributes}).Prepare(context.Background(), &doc, tee.Inputs{})
	for _, all := range []string{"CPU model", "shared directories", "/none is not there"} {
		require.ErrorContains(t, err, all, "all reasons are told at once")
	}
}

func TestPrepareRefusesFirmware(t *testing.T) {
	without := func(n int) []firmware.TDXSection {
		s := testSections()
		return append(s[:n:n], s[n+1:]...)
	}
	unmeasured := testSections()
	unmeasured[0].Attributes = 0
	for want, sections := range map[string][]firmware.TDXSection{
		"has no TDX metadata":      nil,
		"0 sections of code":       without(0),
		"0 for the hand-off block": without(3),
		"is not measured":          unmeasured,
		"2 for the hand-off block": append(testSections(),
			firmware.TDXSection{MemAddress: 0x1000, MemSize: 0x1000, Type: firmware.TDXHandOff}),
		"reaches beyond|reach beyond|beyond": func() []firmware.TDXSection { s := testSections(); s[0].RawSize += 1 << 20; return s }(),
	} {
		path, digest := writeFirmware(t, "", sections)
		doc := testDocument(t)
		err := mustNew(t, Config{Firmware: path, Digests: []string{digest}, Attributes: DefaultAttributes}).Prepare(context.Background(), &doc,
			tee.Inputs{})
		require.ErrorIs(t, err, errdefs.ErrInvalidArgument, want)
		require.Regexp(t, want, err.Error())
	}

	path, digest := writeFirmware(t, driversOld, testSections())
	for name, digests := range map[string][]string{"list of accepted firmware is empty": nil, "not on the list": {strings.Repeat("0", 64)}} {
		doc := testDocument(t)
		err := mustNew(t, Config{Firmware: path, Digests: digests, Attributes: DefaultAttributes}).Prepare(context.Background(), &doc,
			tee.Inputs{})
		require.ErrorContains(t, err, name)
		require.ErrorContains(t, err, digest, "the digest is told, so that it can be accepted")
	}
}

func TestFirmwareByDescriptor(t *testing.T) {
	path, digest := writeFirmware(t, driversOld, testSections())
	dir := t.TempDir()
	d := fmt.Sprintf(`{"description":"d","interface-types":["uefi"],"mapping":{"device":"memory","filename":%q},`+
		`"targets":[{"architecture":"x86_64","machines":["pc-q35-*"]}],"features":["intel-tdx"],"tags":[]}`, path)
	p := mustNew(t, Config{Descriptors: []string{dir}, Digests: []string{digest}, Attributes: DefaultAttributes})
	doc := testDocument(t)
	err := p.Prepare(context.Background(), &doc, tee.Inputs{})
	require.ErrorContains(t, err, "no firmware is configured and none was found")
	require.NoError(t, os.WriteFile(filepath.Join(dir, "60-tdx.json"), []byte(d), 0o644))
	require.NoError(t, p.Prepare(context.Background(), &doc, tee.Inputs{}))
	require.Equal(t, path, doc.Boot.Firmware)
}

func values(t *testing.T, r *tee.ReferenceValues) map[string]tee.Value {
	t.Helper()
	out := map[string]tee.Value{}
	for _, v := range r.Values {
		out[v.Name] = v
		require.NotEmpty(t, v.Note, v.Name)
	}
	return out
}

func TestMeasure(t *testing.T) {
	cfg := testConfig(t, driversOld)
	cfg.ACPI = t.TempDir()
	require.NoError(t, (*hypervisor.ACPITables)(testACPI(2)).Write(cfg.ACPI))
	p := mustNew(t, cfg)
	doc := testDocument(t)
	_, err := p.Measure(context.Background(), doc)
	require.ErrorIs(t, err, errdefs.ErrInvalidArgument, "not prepared")
	require.NoError(t, p.Prepare(context.Background(), &doc, tee.Inputs{InitdataDigest: bytes.Repeat([]byte{7}, 48)}))
	r, err := p.Measure(context.Background(), doc)
	require.NoError(t, err)
	require.Equal(t, tee.TDX, r.Platform)
	require.Equal(t, 2, r.VCPUs)
	require.Equal(t, "host", r.CPUModel)
	require.Equal(t, "quiet cloister.tee=tdx", r.Parameters)
	var roles []string
	for _, i := range r.Inputs {
		roles = append(roles, i.Role)
		require.Len(t, i.SHA256, 64)
	}
	require.Equal(t, []string{"firmware", "kernel", "initrd"}, roles)
	var names []string
	for _, v := range r.Values {
		names = append(names, v.Name)
	}
	require.Equal(t, []string{"tdx.mrtd", "tdx.mrtd_two_pass", "tdx.rtmr0", "tdx.rtmr1", "tdx.rtmr2", "tdx.mrconfigid", "tdx.attributes"},
		names)

	fw, err := readImage(cfg.Firmware)
	require.NoError(t, err)
	single, two := MRTD(fw.raw, fw.parsed)
	old := profile{measures: true, acpi: true, wholeKernel: true, initrd: initrdBehind}
	zero, err := rtmr0(fw, old, doc.Memory.Bytes, testACPI(2))
	require.NoError(t, err)
	one, err := rtmr1(old, testPE(nil))
	require.NoError(t, err)
	second, err := rtmr2(old, "quiet cloister.tee=tdx", []byte("initrd"))
	require.NoError(t, err)
	got := values(t, r)
	for name, want := range map[string]string{
		"tdx.mrtd": single.String(), "tdx.mrtd_two_pass": two.String(),
		"tdx.rtmr0": Extend(zero...).String(), "tdx.rtmr1": Extend(one...).String(), "tdx.rtmr2": Extend(second...).String(),
		"tdx.mrconfigid": strings.Repeat("07", 48), "tdx.attributes": "0000001000000000",
	} {
		require.Equal(t, want, got[name].Hex, name)
	}

	doc.Boot.Parameters = append(doc.Boot.Parameters, "more")
	doc.CPU.Count = 3
	other, err := p.Measure(context.Background(), doc)
	require.NoError(t, err)
	now := values(t, other)
	require.NotEqual(t, got["tdx.rtmr2"].Hex, now["tdx.rtmr2"].Hex)
	require.NotContains(t, now, "tdx.rtmr0", "the ACPI tables are of another VM")
	require.Contains(t, unpredicted(other)["tdx.rtmr0"], "with 2 CPUs, this one has 3")
	for _, same := range []string{"tdx.mrtd", "tdx.mrtd_two_pass", "tdx.rtmr1", "tdx.mrconfigid", "tdx.attributes"} {
		require.Equal(t, got[same], now[same])
	}

	require.NoError(t, os.WriteFile(doc.Boot.Kernel, []byte("no kernel"), 0o644))
	_, err = p.Measure(context.Background(), doc)
	require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
	require.ErrorContains(t, err, "tdx.rtmr1")
	require.NoError(t, os.Remove(doc.Boot.Kernel))
	_, err = p.Measure(context.Background(), doc)
	require.ErrorIs(t, err, os.ErrNotExist)
}

func TestMeasureSaysWhatItCannotPredict(t *testing.T) {
	for name, tt := range map[string]struct {
		drivers string
		missing map[string]string
	}{
		"older build without tables": {driversOld, map[string]string{"tdx.rtmr0": "were not given"}},
		"kernel in parts": {driversParts, map[string]string{"tdx.rtmr0": "were not given",
			"tdx.rtmr1": "whose header QEMU has changed"}},
		"newer build": {driversNew, map[string]string{"tdx.rtmr0": "SMBIOS"}},
		"no measuring driver": {driversPlain, map[string]string{"tdx.rtmr0": "TdTcg2Dxe", "tdx.rtmr1": "TdTcg2Dxe",
			"tdx.rtmr2": "TdTcg2Dxe"}},
		"another kind of firmware": {"", map[string]string{"tdx.rtmr0": "as OVMF", "tdx.rtmr1": "as OVMF", "tdx.rtmr2": "as OVMF"}},
	} {
		t.Run(name, func(t *testing.T) {
			p := mustNew(t, testConfig(t, tt.drivers))
			doc := testDocument(t)
			require.NoError(t, p.Prepare(context.Background(), &doc, tee.Inputs{}))
			r, err := p.Measure(context.Background(), doc)
			require.NoError(t, err)
			got, left := values(t, r), unpredicted(r)
			for name, v := range got {
				require.NotEmpty(t, v.Hex, name)
			}
			require.Len(t, left, len(tt.missing))
			for name, why := range tt.missing {
				require.NotContains(t, got, name, "what has no value is no value")
				require.Contains(t, left[name], why)
			}
			require.Equal(t, strings.Repeat("0", 96), got["tdx.mrconfigid"].Hex)
			require.Equal(t, noteNoConfigID, got["tdx.mrconfigid"].Note)
		})
	}
}
