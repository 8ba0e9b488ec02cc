// SPDX-License-Identifier: Apache-2.0

package virtcontainers

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	agentv1 "github.com/cloister-project/cloister/agent-protocol/v1"
	"github.com/cloister-project/cloister/configs"
	"github.com/cloister-project/cloister/hypervisor"
	"github.com/cloister-project/cloister/tee"
	"github.com/cloister-project/cloister/tee/initdata"
	"github.com/cloister-project/cloister/virtcontainers/network"
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
		{"the pod's goes before", configs.TEE{Initdata: filepath.Join(dir, "nowhere"), InitdataAnnotation: encoded(someInitdata + "c = \"d\"\n")}, someInitdata + "c = \"d\"\n", ""},
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
				require.Empty(t, got.digest())
				return
			}
			require.Equal(t, tc.raw, string(got.doc.Raw))
		})
	}
}

func TestInitdataDisk(t *testing.T) {
	d, err := loadInitdata(&configs.Config{TEE: configs.TEE{InitdataAnnotation: encode(t, someInitdata)}})
	require.NoError(t, err)
	dir := t.TempDir()
	require.NoError(t, d.writeDisk(dir))
	path := d.disk(dir).Path
	info, err := os.Stat(path)
	require.NoError(t, err)
	require.EqualValues(t, 0o400, info.Mode())
	image, err := os.ReadFile(path)
	require.NoError(t, err)
	raw, err := initdata.ReadDisk(bytes.NewReader(image))
	require.NoError(t, err)
	require.Equal(t, someInitdata, string(raw))
	require.ErrorIs(t, d.writeDisk(dir), os.ErrExist, "it is written once")
}

func TestHelloTellsInitdata(t *testing.T) {
	d, err := loadInitdata(&configs.Config{TEE: configs.TEE{InitdataAnnotation: encode(t, someInitdata)}})
	require.NoError(t, err)
	l := &launch{platform: fakePlatform{name: tee.Sample}, initdata: d}
	require.NoError(t, l.checkHello(&agentv1.Hello{Tee: "sample", Initdata: d.digest()}))
	for _, said := range []string{"", "sha256:00", "sha512:" + d.digest()[7:]} {
		err := l.checkHello(&agentv1.Hello{Tee: "sample", Initdata: said})
		require.ErrorIs(t, err, errdefs.ErrFailedPrecondition)
		require.ErrorContains(t, err, d.digest())
	}
}

// A host that lacks something is told so before anything is made.
func TestProbeNamesWhatIsMissing(t *testing.T) {
	l := &launch{platform: fakePlatform{name: tee.SNP, findings: []tee.Finding{
		{What: "CPU", Result: tee.OK}, {What: "firmware", Result: tee.Missing, Detail: "none found", Fix: "install it"},
	}}}
	err := l.probe(t.Context(), tee.Host{})
	var unsupported *tee.UnsupportedError
	require.ErrorAs(t, err, &unsupported)
	require.ErrorIs(t, err, errdefs.ErrFailedPrecondition)
	require.ErrorContains(t, err, "this host cannot launch snp VMs:\n  - firmware: none found; install it")
	require.Len(t, unsupported.Missing, 1)
}

func TestPredictedMeasurement(t *testing.T) {
	platform := func(values *tee.ReferenceValues, err error) *launch {
		return &launch{platform: fakePlatform{name: tee.SNP, measure: func() (*tee.ReferenceValues, error) { return values, err }}}
	}
	got, err := platform(&tee.ReferenceValues{Values: []tee.Value{{Name: "snp.launch_digest", Hex: "00ff"}, {Name: "snp.policy", Hex: "01"}}}, nil).
		predicted(t.Context(), hypervisor.Document{})
	require.NoError(t, err)
	require.Equal(t, "snp.launch_digest=00ff (predicted by this host, not what the hardware reported)", got)
	_, err = platform(nil, errors.New("no firmware")).predicted(t.Context(), hypervisor.Document{})
	require.ErrorContains(t, err, "no firmware")
	_, err = platform(&tee.ReferenceValues{}, nil).predicted(t.Context(), hypervisor.Document{})
	require.Error(t, err)
	for _, name := range []tee.Name{tee.None, tee.Sample} {
		got, err = (&launch{platform: fakePlatform{name: name}}).predicted(t.Context(), hypervisor.Document{})
		require.NoError(t, err)
		require.Empty(t, got, "%s measures nothing", name)
	}
}

// What the ultravisor's number means stands in the pod's error, for Secure Execution alone.
func TestExplainOfTheConsole(t *testing.T) {
	const console = "LOADPARM=[ ]\nProtected boot failed: 0xa02, KVM_PV_UNPACK - RC: 0x108, RRC:0x5\n"
	require.Contains(t, (&launch{platform: fakePlatform{name: tee.SE}}).explain(console), "build it with this machine's host key document")
	require.Empty(t, (&launch{platform: fakePlatform{name: tee.SE}}).explain("Linux version 6.12\n"))
	require.Empty(t, (&launch{platform: fakePlatform{name: tee.Sample}}).explain(console))
}

// Nobody takes a VM that the host can read for a protected one.
func TestDescribeLaunch(t *testing.T) {
	for _, tc := range []struct {
		name        tee.Name
		doc         hypervisor.Confidential
		unprotected bool
	}{
		{tee.SNP, hypervisor.Confidential{SNP: &hypervisor.SNP{Policy: 0x30000}}, false},
		{tee.SNP, hypervisor.Confidential{SNP: &hypervisor.SNP{Policy: 0xb0000}}, true},
		{tee.TDX, hypervisor.Confidential{TDX: &hypervisor.TDX{Attributes: 1 << 28}}, false},
		{tee.TDX, hypervisor.Confidential{TDX: &hypervisor.TDX{Attributes: 1<<28 | 1}}, true},
		{tee.SE, hypervisor.Confidential{SecureExecution: true}, false},
		{tee.Sample, hypervisor.Confidential{}, true},
	} {
		got := describeLaunch(tc.name, &hypervisor.Document{Confidential: &tc.doc})
		require.Contains(t, got, tc.name.Describe())
		require.Equal(t, tc.unprotected, strings.Contains(got, "NO PROTECTION"), got)
	}
	require.Equal(t, tee.None.Describe(), describeLaunch(tee.None, &hypervisor.Document{}))
}

// What is wrong with the only container is told before its VM starts, on every platform.
func TestOnlyContainerIsCheckedWithItsPod(t *testing.T) {
	for _, name := range []tee.Name{tee.None, tee.Sample} {
		cfg := PodConfig{ID: "p", Config: &configs.Config{TEE: configs.TEE{Platform: string(name)}}, Only: &specs.Spec{
			Process: &specs.Process{}, Linux: &specs.Linux{Devices: []specs.LinuxDevice{{Path: "/dev/sda"}}},
			Mounts: []specs.Mount{bind("/dev/null", "/null")},
		}}
		_, err := NewPod(t.Context(), cfg)
		require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
		require.ErrorContains(t, err, "/dev/sda")
		require.ErrorContains(t, err, "/dev/null")
		cfg.Only = &specs.Spec{}
		_, err = NewPod(t.Context(), cfg)
		require.ErrorContains(t, err, "no process")
	}
}

func TestPlanVM(t *testing.T) {
	qemu := os.Getenv("CLOISTER_QEMU")
	if qemu == "" {
		qemu = os.Getenv("CLOISTER_TEST_QEMU")
	}
	if qemu == "" {
		t.Skip("CLOISTER_QEMU names no QEMU")
	}
	dir := t.TempDir()
	cfg := PodConfig{ID: "p", Namespace: "n", Config: &configs.Config{
		Hypervisor: configs.Hypervisor{Path: qemu, Kernel: "/nowhere/kernel", Initrd: "/nowhere/initrd", Accel: "tcg", Arch: "amd64"},
		TEE:        configs.TEE{Platform: "sample", InitdataAnnotation: encode(t, someInitdata)},
		Sizing:     configs.Sizing{DefaultVCPUs: 1, DefaultMemoryMiB: 512},
		State:      configs.State{Dir: filepath.Join(dir, "state")}, Rootfs: configs.Rootfs{CacheDir: filepath.Join(dir, "cache")},
	}}
	doc, platform, err := PlanVM(t.Context(), cfg)
	require.NoError(t, err)
	require.Equal(t, tee.Sample, platform.Name())
	require.Equal(t, "sample", doc.Confidential.Platform)
	require.Equal(t, "/nowhere/kernel", doc.Boot.Kernel)
	require.Len(t, doc.Disks, 1)
	entries, err := os.ReadDir(dir)
	require.NoError(t, err)
	require.Empty(t, entries, "planning makes nothing")

	cfg.HostPID = true
	_, _, err = PlanVM(t.Context(), cfg)
	require.ErrorContains(t, err, "hostPID")
}

// A launch with hardware behind it is planned, and its measurement predicted, on machines that have none of it: no QEMU,
// no KVM, not even this CPU.
func TestPlanVMOfHardwareThatIsNotThere(t *testing.T) {
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
			SNP:                configs.TEESNP{Firmware: image, FirmwareDigests: []string{hex.EncodeToString(sum[:])}, Policy: 0x30000, GuestFeatures: 1},
		},
		Sizing: configs.Sizing{DefaultVCPUs: 2, DefaultMemoryMiB: 512, HotplugPorts: 4}, State: configs.State{Dir: dir}, Rootfs: configs.Rootfs{CacheDir: dir},
	}
	doc, platform, err := PlanVM(t.Context(), PodConfig{ID: "p", Namespace: "n", Config: config})
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

	l := &launch{platform: platform}
	one, err := l.predicted(t.Context(), *doc)
	require.NoError(t, err)
	require.Regexp(t, `^snp\.launch_digest=[0-9a-f]{96} \(predicted`, one)
	// The pod's own names are not measured; what it is sized and started with is.
	other, _, err := PlanVM(t.Context(), PodConfig{ID: "q", Namespace: "m", Hostname: "h", Config: config})
	require.NoError(t, err)
	two, err := l.predicted(t.Context(), *other)
	require.NoError(t, err)
	require.Equal(t, one, two)
	config.Hypervisor.KernelParams = []string{"loglevel=7"}
	other, _, err = PlanVM(t.Context(), PodConfig{ID: "p", Namespace: "n", Config: config})
	require.NoError(t, err)
	two, err = l.predicted(t.Context(), *other)
	require.NoError(t, err)
	require.NotEqual(t, one, two)
}

// A launch whose measurement cannot be predicted is refused by what comes before the VM; Info has what can be.
func TestPrepareDocumentPredicts(t *testing.T) {
	measured := func() (*tee.ReferenceValues, error) {
		return &tee.ReferenceValues{Values: []tee.Value{{Name: "snp.launch_digest", Hex: "00ff"}}}, nil
	}
	for name, tc := range map[string]struct {
		measure func() (*tee.ReferenceValues, error)
		fault   string
	}{
		"predicted":     {measured, ""},
		"not predicted": {func() (*tee.ReferenceValues, error) { return nil, errors.New("no initrd") }, "predict the launch measurement: no initrd"},
	} {
		t.Run(name, func(t *testing.T) {
			p := &Pod{
				cfg: PodConfig{ID: "p", Config: &configs.Config{}}, net: &network.Network{},
				launch: &launch{arch: hypervisor.ArchAMD64, platform: fakePlatform{
					name: tee.SNP, prepare: func(*hypervisor.Document, tee.Inputs) error { return nil }, measure: tc.measure,
				}},
			}
			doc, err := p.prepareDocument(t.Context(), hostFacts{arch: hypervisor.ArchAMD64})
			if tc.fault != "" {
				require.ErrorContains(t, err, tc.fault)
				require.Nil(t, doc)
				require.NotContains(t, p.Info().Extra, "launchMeasurement")
				return
			}
			require.NoError(t, err)
			require.Same(t, p.doc, doc)
			require.Equal(t, "snp.launch_digest=00ff (predicted by this host, not what the hardware reported)", p.Info().Extra["launchMeasurement"])
		})
	}
}
