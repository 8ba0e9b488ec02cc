// SPDX-License-Identifier: Apache-2.0

package vmplan

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	agentv1 "github.com/cloister-project/cloister/agent-protocol/v1"
	"github.com/cloister-project/cloister/configs"
	"github.com/cloister-project/cloister/hypervisor"
	"github.com/cloister-project/cloister/tee"
	"github.com/cloister-project/cloister/tee/initdata"
	"github.com/cloister-project/cloister/tee/none"
	"github.com/cloister-project/cloister/tee/se"
)

const someInitdata = "version = \"0.1.0\"\nalgorithm = \"sha256\"\n[data]\na = \"b\"\n"

func encode(t *testing.T, document string) string {
	t.Helper()
	s, err := initdata.EncodeAnnotation([]byte(document))
	require.NoError(t, err)
	return s
}

func TestLoadInitdata(t *testing.T) {
	dir := t.TempDir()
	write := func(name, content string) string {
		path := filepath.Join(dir, name)
		require.NoError(t, os.WriteFile(path, []byte(content), 0o600))
		return path
	}
	file := write("good", someInitdata)
	encoded := func(s string) string { return encode(t, s) }
	pipe := filepath.Join(dir, "pipe")
	require.NoError(t, unix.Mkfifo(pipe, 0o600))
	for _, tc := range []struct {
		name string
		tee  configs.TEE
		raw  string // of what is loaded
		want string // of the error
	}{
		{"none", configs.TEE{}, "", ""},
		{"the node's", configs.TEE{Initdata: file}, someInitdata, ""},
		{"the pod's goes before", configs.TEE{Initdata: filepath.Join(dir, "nowhere"), InitdataAnnotation: encoded(someInitdata + "c = \"d\"\n")},
			someInitdata + "c = \"d\"\n", ""},
		{"no such file", configs.TEE{Initdata: filepath.Join(dir, "nowhere")}, "", "tee.initdata"},
		{"a pipe", configs.TEE{Initdata: pipe}, "", "not a regular file"},
		{"too large", configs.TEE{Initdata: write("large", string(make([]byte, initdata.MaxRaw+1)))}, "", "larger than"},
		{"not valid", configs.TEE{Initdata: write("bad", "version = 1")}, "", "tee.initdata"},
		{"the pod's is not valid", configs.TEE{InitdataAnnotation: encoded("algorithm = \"md5\"")}, "", "the pod's initdata"},
		{"the pod's is no document", configs.TEE{InitdataAnnotation: "bm90aGluZw=="}, "", "the pod's initdata"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got, err := loadInitdata(&configs.Config{TEE: tc.tee})
			if tc.want != "" {
				require.ErrorContains(t, err, tc.want)
				return
			}
			require.NoError(t, err)
			if tc.raw == "" {
				require.Nil(t, got)
				require.Empty(t, (&Plan{}).InitdataDigest())
				return
			}
			require.Equal(t, tc.raw, string(got.Raw))
		})
	}
}

func TestInitdataDisk(t *testing.T) {
	d, err := loadInitdata(&configs.Config{TEE: configs.TEE{InitdataAnnotation: encode(t, someInitdata)}})
	require.NoError(t, err)
	p := &Plan{cfg: &configs.Config{State: configs.State{Dir: t.TempDir()}}, initdata: d}
	require.NoError(t, os.Mkdir(p.StateDir(), 0o700))
	require.NoError(t, p.WriteInitdata())
	path := p.initdataDisk().Path
	info, err := os.Stat(path)
	require.NoError(t, err)
	require.EqualValues(t, 0o400, info.Mode())
	image, err := os.ReadFile(path)
	require.NoError(t, err)
	raw, err := initdata.ReadDisk(bytes.NewReader(image))
	require.NoError(t, err)
	require.Equal(t, someInitdata, string(raw))
	require.ErrorIs(t, p.WriteInitdata(), os.ErrExist, "it is written once")
	require.NoError(t, (&Plan{}).WriteInitdata(), "there is none")
}

func TestHelloTellsInitdata(t *testing.T) {
	d, err := loadInitdata(&configs.Config{TEE: configs.TEE{InitdataAnnotation: encode(t, someInitdata)}})
	require.NoError(t, err)
	p := &Plan{platform: fakePlatform{name: tee.Sample}, initdata: d}
	digest := p.InitdataDigest()
	require.NoError(t, p.CheckHello(&agentv1.Hello{Tee: "sample", Initdata: digest}))
	for _, said := range []string{"", "sha256:00", "sha512:" + digest[7:]} {
		err := p.CheckHello(&agentv1.Hello{Tee: "sample", Initdata: said})
		require.ErrorIs(t, err, errdefs.ErrFailedPrecondition)
		require.ErrorContains(t, err, digest)
	}
}

// A host that lacks something is told so before anything is made.
func TestProbeNamesWhatIsMissing(t *testing.T) {
	p := &Plan{cfg: &configs.Config{}, driver: fakeDriver{}, platform: fakePlatform{name: tee.SNP, findings: []tee.Finding{
		{What: "CPU", Result: tee.OK}, {What: "firmware", Result: tee.Missing, Detail: "none found", Fix: "install it"},
	}}}
	err := p.Probe(t.Context())
	var unsupported *tee.UnsupportedError
	require.ErrorAs(t, err, &unsupported)
	require.ErrorIs(t, err, errdefs.ErrFailedPrecondition)
	require.ErrorContains(t, err, "this host cannot launch snp VMs:\n  - firmware: none found; install it")
	require.Len(t, unsupported.Missing, 1)
}

func TestPredictedMeasurement(t *testing.T) {
	platform := func(values *tee.ReferenceValues, err error) *Plan {
		return &Plan{platform: fakePlatform{name: tee.SNP, measure: func() (*tee.ReferenceValues, error) { return values, err }}}
	}
	got, err := platform(&tee.ReferenceValues{Values: []tee.Value{{Name: "snp.launch_digest", Hex: "00ff"}, {Name: "snp.policy", Hex: "01"}}},
		nil).
		predict(t.Context(), hypervisor.Document{})
	require.NoError(t, err)
	require.Equal(t, "snp.launch_digest=00ff (predicted by this host, not what the hardware reported)", got)
	_, err = platform(nil, errors.New("no firmware")).predict(t.Context(), hypervisor.Document{})
	require.ErrorContains(t, err, "no firmware")
	_, err = platform(&tee.ReferenceValues{}, nil).predict(t.Context(), hypervisor.Document{})
	require.Error(t, err)
	for _, name := range []tee.Name{tee.None, tee.Sample} {
		got, err = (&Plan{platform: fakePlatform{name: name}}).predict(t.Context(), hypervisor.Document{})
		require.NoError(t, err)
		require.Empty(t, got, "%s measures nothing", name)
	}
}

// What the ultravisor's number means stands in the pod's error, for Secure Execution alone.
func TestExplain(t *testing.T) {
	const console = "LOADPARM=[ ]\nProtected boot failed: 0xa02, KVM_PV_UNPACK - RC: 0x108, RRC:0x5\n"
	sealed, err := se.New(se.Config{Image: "/se.img"})
	require.NoError(t, err)
	exit := hypervisor.Exit{Reason: hypervisor.ExitGuestPanic, Detail: "reset", Console: console}
	err = (&Plan{platform: sealed}).Explain(fmt.Errorf("start: %w", exit))
	require.ErrorContains(t, err, "build it with this machine's host key document")
	require.ErrorAs(t, err, &hypervisor.Exit{}, "the end itself is told too")
	for _, other := range []error{hypervisor.Exit{Console: "Linux version 6.12\n"}, errors.New(console)} {
		require.Equal(t, other, (&Plan{platform: sealed}).Explain(other))
	}
	require.Equal(t, error(exit), (&Plan{platform: none.New()}).Explain(exit))
}

// Nobody takes a VM that the host can read for a protected one.
func TestDescribeLaunch(t *testing.T) {
	policy := func(p uint64) *configs.Config {
		return &configs.Config{Hypervisor: configs.Hypervisor{Arch: configs.ArchAMD64}, TEE: configs.TEE{
			Platform: "snp", AllowDebug: true, SNP: configs.TEESNP{Policy: p, GuestFeatures: 1},
		}}
	}
	attributes := func(a uint64) *configs.Config {
		return &configs.Config{Hypervisor: configs.Hypervisor{Arch: configs.ArchAMD64}, TEE: configs.TEE{
			Platform: "tdx", AllowDebug: true, TDX: configs.TEETDX{Attributes: a},
		}}
	}
	for name, tc := range map[string]struct {
		cfg         *configs.Config
		doc         hypervisor.Confidential
		unprotected bool
	}{
		"snp":           {policy(0x30000), hypervisor.Confidential{SNP: &hypervisor.SNP{Policy: 0x30000}}, false},
		"snp, debugged": {policy(0xb0000), hypervisor.Confidential{SNP: &hypervisor.SNP{Policy: 0xb0000}}, true},
		"tdx":           {attributes(1 << 28), hypervisor.Confidential{TDX: &hypervisor.TDX{Attributes: 1 << 28}}, false},
		"tdx, debugged": {attributes(1<<28 | 1), hypervisor.Confidential{TDX: &hypervisor.TDX{Attributes: 1<<28 | 1}}, true},
		"sample":        {&configs.Config{TEE: configs.TEE{Platform: "sample"}}, hypervisor.Confidential{}, true},
	} {
		p := testPlan(t, Pod{Config: tc.cfg})
		doc := &hypervisor.Document{Confidential: &tc.doc}
		got := p.Describe(doc)
		require.Contains(t, got, p.Name().Describe(), name)
		require.Equal(t, tc.unprotected, strings.Contains(got, "NO PROTECTION"), got)
		require.Equal(t, tc.unprotected, p.HostCanRead(doc), name)
	}
	ordinary := testPlan(t, Pod{Config: &configs.Config{}})
	require.Equal(t, tee.None.Describe(), ordinary.Describe(&hypervisor.Document{}))
	require.False(t, ordinary.HostCanRead(&hypervisor.Document{}), "it promises nothing")
}

func TestDry(t *testing.T) {
	qemu := os.Getenv("CLOISTER_QEMU")
	if qemu == "" {
		qemu = os.Getenv("CLOISTER_TEST_QEMU")
	}
	if qemu == "" {
		t.Skip("CLOISTER_QEMU names no QEMU")
	}
	dir := t.TempDir()
	p := testPlan(t, Pod{ID: "p", Namespace: "n", Config: &configs.Config{
		Hypervisor: configs.Hypervisor{Path: qemu, Kernel: "/nowhere/kernel", Initrd: "/nowhere/initrd", Accel: "tcg", Arch: "amd64"},
		TEE:        configs.TEE{Platform: "sample", InitdataAnnotation: encode(t, someInitdata)},
		Sizing:     configs.Sizing{DefaultVCPUs: 1, DefaultMemoryMiB: 512},
		State:      configs.State{Dir: filepath.Join(dir, "state")}, Rootfs: configs.Rootfs{CacheDir: filepath.Join(dir, "cache")},
	}})
	doc, err := p.Dry(t.Context())
	require.NoError(t, err)
	require.Equal(t, tee.Sample, doc.Confidential.Platform)
	require.Equal(t, "/nowhere/kernel", doc.Boot.Kernel)
	require.Len(t, doc.Disks, 1)
	entries, err := os.ReadDir(dir)
	require.NoError(t, err)
	require.Empty(t, entries, "planning makes nothing")
}

// A launch with hardware behind it is planned, and its measurement predicted, on machines that have none of it: no QEMU,
// no KVM, not even this CPU.
func TestDryOfHardwareThatIsNotThere(t *testing.T) {
	image := os.Getenv("CLOISTER_TEST_OVMF_AMDSEV")
	if image == "" {
		t.Skip("CLOISTER_TEST_OVMF_AMDSEV names no firmware")
	}
	firmware, err := os.ReadFile(image)
	require.NoError(t, err)
	dir := t.TempDir()
	kernel, initrd := filepath.Join(dir, "kernel"), filepath.Join(dir, "initrd")
	bzImage := make([]byte, 4096)
	copy(bzImage[0x202:], "HdrS") // Linux, Documentation/arch/x86/boot.rst
	require.NoError(t, os.WriteFile(kernel, bzImage, 0o600))
	require.NoError(t, os.WriteFile(initrd, []byte("initrd"), 0o600))
	sum := sha256.Sum256(firmware)
	config := &configs.Config{
		Hypervisor: configs.Hypervisor{Path: "/nowhere/qemu", Kernel: kernel, Initrd: initrd, Arch: "amd64", Accel: "auto", Vsock: "auto"},
		TEE: configs.TEE{
			Platform: "snp", SwiotlbMiB: 64,
			InitdataAnnotation: encode(t, someInitdata),
			SNP: configs.TEESNP{Firmware: image, FirmwareDigests: []string{hex.EncodeToString(sum[:])}, Policy: 0x30000,
				GuestFeatures: 1},
		},
		Sizing: configs.Sizing{DefaultVCPUs: 2, DefaultMemoryMiB: 512,
			HotplugPorts: 4}, State: configs.State{Dir: dir}, Rootfs: configs.Rootfs{CacheDir: dir},
	}
	p := testPlan(t, Pod{ID: "p", Namespace: "n", Config: config})
	doc, err := p.Dry(t.Context())
	require.NoError(t, err)
	require.Equal(t, hypervisor.AccelKVM, doc.Accelerator)
	require.Equal(t, "EPYC-v4", doc.CPU.Model)
	require.Equal(t, kernel, doc.Boot.Kernel, "the image as it is: its bytes are measured")
	require.Equal(t, image, doc.Boot.Firmware)
	require.Equal(t, hypervisor.VsockVhost, doc.Vsock.Kind)
	require.True(t, doc.Confidential.SNP.KernelHashes)
	d, err := initdata.Parse([]byte(someInitdata))
	require.NoError(t, err)
	require.Equal(t, initdata.Bind(d.Digest(), 32), doc.Confidential.SNP.HostData)

	one, err := p.predict(t.Context(), *doc)
	require.NoError(t, err)
	require.Regexp(t, `^snp\.launch_digest=[0-9a-f]{96} \(predicted`, one)
	// The pod's own names are not measured; what it is sized and started with is.
	other, err := testPlan(t, Pod{ID: "q", Namespace: "m", Config: config}).Dry(t.Context())
	require.NoError(t, err)
	two, err := p.predict(t.Context(), *other)
	require.NoError(t, err)
	require.Equal(t, one, two)
	config.Hypervisor.KernelParams = []string{"loglevel=7"}
	other, err = testPlan(t, Pod{ID: "p", Namespace: "n", Config: config}).Dry(t.Context())
	require.NoError(t, err)
	two, err = p.predict(t.Context(), *other)
	require.NoError(t, err)
	require.NotEqual(t, one, two)
}

func TestHelloOfTheLaunch(t *testing.T) {
	for _, tc := range []struct {
		asked tee.Name
		said  string
		want  string
	}{
		{tee.None, "", ""}, {tee.None, "none", ""}, {tee.Sample, "sample", ""}, {tee.SNP, "snp", ""},
		{tee.None, "snp", `guest says "snp"`}, {tee.SNP, "", `guest says "none"`}, {tee.SNP, "sample", `guest says "sample"`},
		{tee.SNP, "\x1b[31m" + strings.Repeat("x", 1<<16), `"\x1b[31mxxx`},
	} {
		p := &Plan{platform: fakePlatform{name: tc.asked}}
		err := p.CheckHello(&agentv1.Hello{Tee: tc.said})
		if tc.want == "" {
			require.NoError(t, err)
			continue
		}
		require.ErrorIs(t, err, errdefs.ErrFailedPrecondition)
		require.ErrorContains(t, err, tc.want)
		require.Less(t, len(err.Error()), 2048)
	}
	p := &Plan{platform: fakePlatform{name: tee.Sample}}
	require.ErrorContains(t, p.CheckHello(&agentv1.Hello{Tee: "sample", Initdata: "sha256:00"}),
		"the pod's initdata is none and the guest found \"sha256:00\"")
}

// A launch whose measurement cannot be predicted is not started.
func TestPreparePredicts(t *testing.T) {
	measured := func() (*tee.ReferenceValues, error) {
		return &tee.ReferenceValues{Values: []tee.Value{{Name: "snp.launch_digest", Hex: "00ff"}}}, nil
	}
	prepared := func(*hypervisor.Document, tee.Inputs) error { return nil }
	refused := func(*hypervisor.Document, tee.Inputs) error { return errors.New("no firmware") }
	for name, tc := range map[string]struct {
		platform fakePlatform
		fault    string
	}{
		"predicted":    {fakePlatform{prepare: prepared, measure: measured}, ""},
		"not prepared": {fakePlatform{prepare: refused, measure: measured}, `launch with tee.platform = "snp": no firmware`},
		"not predicted": {fakePlatform{prepare: prepared, measure: func() (*tee.ReferenceValues, error) { return nil, errors.New("no initrd") }},
			"no initrd"},
	} {
		t.Run(name, func(t *testing.T) {
			tc.platform.name = tee.SNP
			got, err := (&Plan{platform: tc.platform}).Prepare(t.Context(), &hypervisor.Document{})
			if tc.fault != "" {
				require.ErrorContains(t, err, tc.fault)
				return
			}
			require.NoError(t, err)
			require.Equal(t, "snp.launch_digest=00ff (predicted by this host, not what the hardware reported)", got)
		})
	}
}

func TestCheckFiles(t *testing.T) {
	dir := t.TempDir()
	there, gone := filepath.Join(dir, "there"), filepath.Join(dir, "gone")
	require.NoError(t, os.WriteFile(there, []byte("x"), 0o755))
	for name, tc := range map[string]struct {
		change func(*configs.Config)
		want   []string
	}{
		"all there": {func(*configs.Config) {}, nil},
		"ordinary": {func(c *configs.Config) {
			c.Hypervisor.Kernel, c.Hypervisor.Initrd, c.Hypervisor.Path = gone, gone, gone
		},
			[]string{"hypervisor.kernel", "hypervisor.initrd", "hypervisor.path"}},
		"se needs no kernel": {func(c *configs.Config) {
			c.Hypervisor.Arch, c.Hypervisor.Kernel, c.TEE.Platform, c.TEE.SE.Image = configs.ArchS390X, gone, "se", there
		}, nil},
		"se needs its image": {func(c *configs.Config) {
			c.Hypervisor.Arch, c.TEE.Platform, c.TEE.SE.Image = configs.ArchS390X, "se", gone
		}, []string{"tee.se.image"}},
		"sample boots the kernel": {func(c *configs.Config) { c.TEE.Platform, c.Hypervisor.Kernel = "sample", gone },
			[]string{"hypervisor.kernel"}},
		"sample, sealed": {func(c *configs.Config) {
			c.Hypervisor.Arch, c.Hypervisor.Kernel, c.TEE.Platform, c.TEE.SE.Image = configs.ArchS390X, gone, "sample", gone
		}, []string{"tee.se.image"}},
		"snp": {func(c *configs.Config) {
			c.TEE.Platform, c.TEE.SNP.Firmware, c.TEE.SNP.IDKey, c.TEE.SNP.AuthorKey = "snp", gone, gone, gone
		}, []string{"tee.snp.firmware", "tee.snp.id_key", "tee.snp.author_key"}},
		"tdx": {func(c *configs.Config) { c.TEE.Platform, c.TEE.TDX.Firmware, c.TEE.SNP.IDKey = "tdx", gone, gone },
			[]string{"tee.tdx.firmware"}},
		"ordinary VMs do not read theirs": {func(c *configs.Config) { c.TEE.SNP.Firmware, c.TEE.TDX.Firmware = gone, gone }, nil},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := &configs.Config{Hypervisor: configs.Hypervisor{Arch: configs.ArchAMD64, Path: there, Kernel: there, Initrd: there}}
			tc.change(cfg)
			var keys []string
			if err := testPlan(t, Pod{ID: "p", Config: cfg}).CheckFiles(); err != nil {
				var faults configs.Faults
				require.ErrorAs(t, err, &faults)
				for _, f := range faults {
					require.Contains(t, f.Reason, gone)
					keys = append(keys, f.Key)
				}
			}
			require.Equal(t, tc.want, keys)
		})
	}
}
