// SPDX-License-Identifier: Apache-2.0

package se

import (
	"context"
	"crypto/ecdh"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	mathrand "math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"

	"github.com/cloister-project/cloister/hypervisor"
	"github.com/cloister-project/cloister/tee"
	"github.com/cloister-project/cloister/tee/abi"
	"github.com/cloister-project/cloister/tee/hostprobe"
	"github.com/cloister-project/cloister/tee/se/hostkey"
	"github.com/cloister-project/cloister/tee/se/image"
)

func newKey(t testing.TB, n byte) *ecdh.PrivateKey {
	t.Helper()
	key, err := hostkey.NewKey(mathrand.NewChaCha8([32]byte{n}))
	require.NoError(t, err)
	return key
}

func hashOf(t testing.TB, n byte) string {
	t.Helper()
	h, err := hostkey.Hash(newKey(t, n).PublicKey())
	require.NoError(t, err)
	return hex.EncodeToString(h[:])
}

// testImage writes an image for the hosts 1 and 2, of files that only look like a kernel and the stubs.
func testImage(t testing.TB, options image.Options) string {
	t.Helper()
	kernel := make([]byte, 0x11000)
	copy(kernel[0x10008:], "S390EP")
	img, err := image.Build(context.Background(), image.BuildConfig{
		Sources:  &image.Sources{Kernel: kernel, Stage3a: make([]byte, 0x2000), Stage3b: make([]byte, 0x1000)},
		HostKeys: []*ecdh.PublicKey{newKey(t, 1).PublicKey(), newKey(t, 2).PublicKey()},
		Options:  options, Random: mathrand.NewChaCha8([32]byte{7}),
	})
	require.NoError(t, err)
	path := filepath.Join(t.TempDir(), "guest.img")
	require.NoError(t, os.WriteFile(path, img.Bytes(), 0o600))
	return path
}

func testPlatform(t testing.TB, cfg Config) *Platform {
	t.Helper()
	p, err := New(cfg)
	require.NoError(t, err)
	return p
}

func testDocument() *hypervisor.Document {
	return &hypervisor.Document{
		Architecture: hypervisor.ArchS390X, Accelerator: hypervisor.AccelKVM, CPU: hypervisor.CPU{Model: "host",
			Count: 2}, Memory: hypervisor.Memory{Bytes: 512 << 20},
		Boot: hypervisor.Boot{Kernel: "/k", Initrd: "/i", Parameters: []string{"a"}},
	}
}

func TestNew(t *testing.T) {
	for _, path := range []string{"", "image", "./image"} {
		_, err := New(Config{Image: path})
		require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
	}
	require.Equal(t, tee.SE, testPlatform(t, Config{Image: "/not/there"}).Name())
}

func TestPrepareAndMeasure(t *testing.T) {
	ctx := context.Background()
	path := testImage(t, image.Options{})
	p := testPlatform(t, Config{Image: path})
	doc := testDocument()
	_, err := p.Measure(ctx, *doc)
	require.ErrorIs(t, err, errdefs.ErrInvalidArgument, "not prepared")
	require.NoError(t, p.Prepare(ctx, doc, tee.Inputs{InitdataDigest: []byte{1}}))
	require.Equal(t, hypervisor.Boot{Kernel: path, Sealed: true}, doc.Boot)
	require.Equal(t, &hypervisor.Confidential{Platform: "se", SecureExecution: true}, doc.Confidential)

	got, err := p.Measure(ctx, *doc)
	require.NoError(t, err)
	b, err := os.ReadFile(path)
	require.NoError(t, err)
	// By the layout: the header of 560 + 2 * 80 bytes is on page 0x14000.
	h := b[0x14000:]
	want := map[string][]string{
		"se.tag": {hex.EncodeToString(h[704:720])}, "se.pld": {hex.EncodeToString(h[0xe0:0x120])}, "se.ald": {hex.EncodeToString(h[0x120:0x160])},
		"se.tld": {hex.EncodeToString(h[0x160:0x1a0])}, "se.image_phkh": {hashOf(t, 1), hashOf(t, 2)},
	}
	values := map[string][]string{}
	for _, v := range got.Values {
		values[v.Name] = append(values[v.Name], v.Hex)
	}
	require.Equal(t, want, values)
	require.Equal(t, "se.tag", got.Values[0].Name)
	digest := sha256.Sum256(b)
	require.Equal(t, []tee.Input{{Role: "image", Path: path, SHA256: hex.EncodeToString(digest[:])}}, got.Inputs)
	require.Equal(t, 2, got.VCPUs)

	require.NoError(t, os.WriteFile(path, b[:0x14100], 0o600))
	_, err = p.Measure(ctx, *doc)
	require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
}

func TestPrepareRefuses(t *testing.T) {
	path := testImage(t, image.Options{})
	dump := testImage(t, image.Options{AllowDump: true, CCK: make([]byte, image.CCKSize)})
	clear := filepath.Join(t.TempDir(), "clear.img")
	b, err := os.ReadFile(path)
	require.NoError(t, err)
	b[0x14038+4] |= 0x10 // PCF bit 35
	require.NoError(t, os.WriteFile(clear, b, 0o600))
	kernel := filepath.Join(t.TempDir(), "vmlinuz")
	require.NoError(t, os.WriteFile(kernel, make([]byte, 1<<20), 0o600))

	tests := map[string]struct {
		image  string
		change func(*hypervisor.Document)
		says   string
	}{
		"amd64":              {path, func(d *hypervisor.Document) { d.Architecture = hypervisor.ArchAMD64 }, "the VM is for amd64"},
		"firmware":           {path, func(d *hypervisor.Document) { d.Boot.Firmware = "/f" }, "firmware"},
		"emulated":           {path, func(d *hypervisor.Document) { d.Accelerator = hypervisor.AccelTCG }, "only KVM"},
		"CPU model":          {path, func(d *hypervisor.Document) { d.CPU.Model = "z16" }, "unpack facility"},
		"vsock on PCI":       {path, func(d *hypervisor.Document) { d.Vsock.Kind = hypervisor.VsockVhostUser }, "load the module vhost_vsock"},
		"shared directories": {path, func(d *hypervisor.Document) { d.SharedDirectories = 1 }, "shared directories"},
		"another already": {path, func(d *hypervisor.Document) {
			d.Confidential = &hypervisor.Confidential{Platform: "snp"}
		}, `"snp" already`},
		"little memory": {path, func(d *hypervisor.Document) { d.Memory.Bytes = 1000 }, "memory"},
		"dumps":         {dump, nil, "allow_debug"},
		"not encrypted": {clear, nil, "not encrypted"},
		"no image":      {kernel, nil, "no Secure Execution image"},
		"not there":     {path + "x", nil, "no such file"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			doc := testDocument()
			if tt.change != nil {
				tt.change(doc)
			}
			before := *doc
			err := testPlatform(t, Config{Image: tt.image}).Prepare(context.Background(), doc, tee.Inputs{})
			require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
			require.ErrorContains(t, err, tt.says)
			require.Equal(t, before, *doc, "nothing was changed")
		})
	}
	doc := testDocument()
	doc.Architecture, doc.SharedDirectories = hypervisor.ArchAMD64, 1
	err = testPlatform(t, Config{Image: kernel}).Prepare(context.Background(), doc, tee.Inputs{})
	for _, all := range []string{"amd64", "shared directories", "no Secure Execution image"} {
		require.ErrorContains(t, err, all)
	}
	require.NoError(t, testPlatform(t, Config{Image: dump, AllowDebug: true}).Prepare(context.Background(), testDocument(), tee.Inputs{}))
}

// tree is a host of files.
func tree(t testing.TB, files map[string]string) hostprobe.Host {
	t.Helper()
	h := hostprobe.Host{Root: t.TempDir(), Extension: func(int) (int, error) { return 1, nil }}
	for path, content := range files {
		path = filepath.Join(h.Root, path)
		require.NoError(t, os.MkdirAll(filepath.Dir(path), 0o755))
		require.NoError(t, os.WriteFile(path, []byte(content), 0o644))
	}
	return h
}

func TestProbe(t *testing.T) {
	path := testImage(t, image.Options{})
	unused := strings.Repeat("0", 64)
	good := func() map[string]string {
		return map[string]string{
			"proc/cpuinfo":                   "vendor_id       : IBM/S390\nfacilities      : 0 1 2 158 161\n",
			"proc/cmdline":                   "root=/dev/dasda1 prot_virt=1\n",
			"sys/firmware/uv/prot_virt_host": "1\n",
			"sys/firmware/uv/keys/all":       strings.ToUpper(hashOf(t, 2)) + "\n" + strings.Repeat(unused+"\n", 14),
		}
	}
	all := tee.Host{Accelerator: hypervisor.AccelKVM, VMM: vmm("")}
	names := []string{"machine", "CPU facilities", "ultravisor", "KVM", "image", "host key", "VMM"}
	tests := map[string]struct {
		change  func(files map[string]string, h *tee.Host)
		ext     func(int) (int, error)
		image   string
		missing map[string]string // what: part of the detail
		note    string
	}{
		"all there": {},
		"no unpack shown": {change: func(f map[string]string, _ *tee.Host) {
			f["proc/cpuinfo"] = "vendor_id : IBM/S390\nfacilities : 158\n"
		}, note: "CPU facilities"},
		"no facility": {change: func(f map[string]string, _ *tee.Host) {
			f["proc/cpuinfo"] = "vendor_id : IBM/S390\nfacilities : 161\n"
		}, missing: map[string]string{"CPU facilities": "158"}},
		"not switched on": {change: func(f map[string]string, _ *tee.Host) {
			f["sys/firmware/uv/prot_virt_host"], f["proc/cmdline"] = "0", "quiet"
		}, missing: map[string]string{"ultravisor": "no prot_virt=1"}},
		"switched on in vain": {change: func(f map[string]string, _ *tee.Host) { delete(f, "sys/firmware/uv/prot_virt_host") },
			missing: map[string]string{"ultravisor": "although"}},
		"is a guest": {change: func(f map[string]string, _ *tee.Host) {
			f["sys/firmware/uv/prot_virt_host"], f["sys/firmware/uv/prot_virt_guest"] = "0", "1"
		}, missing: map[string]string{"ultravisor": "is a Secure Execution guest"}},
		"emulated": {change: func(_ map[string]string, h *tee.Host) { h.Accelerator = hypervisor.AccelTCG },
			missing: map[string]string{"KVM": "tcg"}},
		"old KVM": {ext: func(int) (int, error) { return 0, nil }, missing: map[string]string{"KVM": "KVM_CAP_S390_PROTECTED is 0"}},
		"no KVM":  {ext: func(int) (int, error) { return 0, errors.New("no /dev/kvm") }, missing: map[string]string{"KVM": "no /dev/kvm"}},
		"another host": {change: func(f map[string]string, _ *tee.Host) { f["sys/firmware/uv/keys/all"] = hashOf(t, 3) },
			missing: map[string]string{"host key": hashOf(t, 3)}},
		"no list": {change: func(f map[string]string, _ *tee.Host) { delete(f, "sys/firmware/uv/keys/all") }, note: "host key"},
		"strange list": {change: func(f map[string]string, _ *tee.Host) { f["sys/firmware/uv/keys/all"] = "hello" },
			missing: map[string]string{"host key": "no hash"}},
		"empty list": {change: func(f map[string]string, _ *tee.Host) { f["sys/firmware/uv/keys/all"] = unused },
			missing: map[string]string{"host key": "no key"}},
		"long list": {change: func(f map[string]string, _ *tee.Host) {
			f["sys/firmware/uv/keys/all"] = strings.Repeat(unused+"\n", 16)
		}, missing: map[string]string{"host key": "16 lines"}},
		"no image": {image: path + "x", missing: map[string]string{"image": "no such file", "host key": "no image"}},
		"no QEMU":  {change: func(_ map[string]string, h *tee.Host) { h.VMM = nil }, missing: map[string]string{"VMM": "none was found"}},
		"QEMU without": {change: func(_ map[string]string, h *tee.Host) { h.VMM = vmm("no s390-pv-guest") },
			missing: map[string]string{"VMM": "no s390-pv-guest"}},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			files, h := good(), all
			if tt.change != nil {
				tt.change(files, &h)
			}
			p := testPlatform(t, Config{Image: path})
			if tt.image != "" {
				p.cfg.Image = tt.image
			}
			p.host = tree(t, files)
			if tt.ext != nil {
				p.host.Extension = tt.ext
			}
			findings := p.Probe(context.Background(), h)
			require.Len(t, findings, len(names))
			for i, f := range findings {
				require.Equal(t, names[i], f.What)
				want, isMissing := tt.missing[f.What]
				switch {
				case isMissing:
					require.Equal(t, tee.Missing, f.Result, f.What)
					require.Contains(t, f.Detail, want)
					require.NotEmpty(t, f.Fix)
				case f.What == tt.note:
					require.Equal(t, tee.Note, f.Result, f.What)
				default:
					require.Equal(t, tee.OK, f.Result, "%s: %s", f.What, f.Detail)
				}
			}
			err := tee.Supported(tee.SE, findings)
			require.Equal(t, len(tt.missing) > 0, errdefs.IsFailedPrecondition(err))
		})
	}
}

func TestProbeOnAnotherMachine(t *testing.T) {
	p := testPlatform(t, Config{Image: testImage(t, image.Options{})})
	p.host = tree(t, map[string]string{"proc/cpuinfo": "vendor_id : GenuineIntel\n"})
	findings := p.Probe(context.Background(), tee.Host{})
	require.Len(t, findings, 2)
	require.Equal(t, tee.Missing, findings[0].Result)
	require.Contains(t, findings[0].Detail, "GenuineIntel")
	require.Equal(t, tee.OK, findings[1].Result)
	p.host = tree(t, nil)
	require.Error(t, tee.Supported(tee.SE, p.Probe(context.Background(), tee.Host{})))
}

func TestExplainBootError(t *testing.T) {
	line := func(rc, rrc string) string {
		return "LOADPARM=[ ]\nProtected boot failed: 0xa02, KVM_PV_UNPACK - RC: " + rc + ", RRC:" + rrc + "\n"
	}
	for console, want := range map[string]string{
		"": "", "Linux version 6.12\n": "", "Protected boot failed: ": "",
		"\n!Secure unpack facility is not available\n": "no unpack facility",
		line("0x102", "0x1a"):                          "(ALD); copy",
		line("0x0102", "0x1b"): "RC 0x0102, RRC 0x1b): the image does not match its header: the content of its " +
			"components is another (PLD)",
		line("0x102", "0x1c"):                        "(TLD)",
		line("0x102", "0x1d"):                        "number of its pages",
		line("0x102", "0x77"):                        "does not match its header; copy",
		line("0x104", "0x0"):                         "version",
		line("0x106", "0x0"):                         "plaintext control flag",
		line("0x108", "0x5"):                         "another than that of the image: no host key",
		line("0x108", "0x1"):                         "): no host key",
		line("0x109", "0x0"):                         "secret control flag",
		line("0x10a", "0x0"):                         "corrupt",
		line("0x999", "0x0"):                         "not known",
		"Protected boot has failed: 0xa02\n":         "refused the image (0xa02)",
		strings.Repeat("x", maxConsole) + noFacility: "",
	} {
		got := explainBootError(console)
		if want == "" {
			require.Empty(t, got, console)
			continue
		}
		require.Contains(t, got, want)
	}
}

func FuzzExplainBootError(f *testing.F) {
	f.Add("Protected boot failed: 0xa02, KVM_PV_UNPACK - RC: 0x108, RRC:0x5\n")
	f.Add("Secure unpack facility is not available")
	f.Fuzz(func(t *testing.T, console string) {
		require.Less(t, len(explainBootError(console)), 600)
	})
}

func FuzzParseHostKeys(f *testing.F) {
	f.Add(strings.Repeat("ab", 32) + "\n" + strings.Repeat("0", 64))
	f.Fuzz(func(t *testing.T, text string) {
		keys, err := parseHostKeys(text)
		if err != nil {
			return
		}
		require.NotEmpty(t, keys)
		for _, k := range keys {
			require.Len(t, k, 64)
			require.NotEqual(t, strings.Repeat("0", 64), k)
		}
	})
}

// vmm lacks something of the platform; "": nothing.
func vmm(lacks string) *hypervisor.Capabilities {
	return &hypervisor.Capabilities{Platforms: map[abi.Platform]string{tee.SE: lacks}}
}
