// SPDX-License-Identifier: Apache-2.0

package tdx

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"

	"github.com/cloister-project/cloister/hypervisor"
	"github.com/cloister-project/cloister/tee"
	"github.com/cloister-project/cloister/tee/abi"
	"github.com/cloister-project/cloister/tee/firmware"
	"github.com/cloister-project/cloister/tee/hostprobe"
)

// fakeHost is a machine that has everything; change takes away.
type fakeHost struct {
	files      map[string]string
	extensions map[int]int
	kvm        error
	host       tee.Host
	config     Config
}

func wholeHost(t *testing.T) *fakeHost {
	return &fakeHost{
		files: map[string]string{
			"proc/cpuinfo":                        "vendor_id\t: GenuineIntel\n",
			"sys/module/kvm_intel/parameters/tdx": "Y\n",
			"sys/fs/cgroup/misc.capacity":         "tdx 31\n",
			"sys/fs/cgroup/misc.current":          "tdx 3\n",
		},
		extensions: map[int]int{
			hostprobe.CapVMTypes:          1<<hostprobe.VMTypeDefault | 1<<hostprobe.VMTypeTDX,
			hostprobe.CapMemoryAttributes: hostprobe.MemoryAttributePrivate,
			hostprobe.CapGuestMemfd:       1, hostprobe.CapX86APICBusCyclesNS: 1,
		},
		host:   tee.Host{Accelerator: hypervisor.AccelKVM, VMM: vmm("")},
		config: testConfig(t, driversOld),
	}
}

func (h *fakeHost) probe(t *testing.T) []tee.Finding {
	t.Helper()
	root := t.TempDir()
	for path, content := range h.files {
		path = filepath.Join(root, path)
		require.NoError(t, os.MkdirAll(filepath.Dir(path), 0o755))
		require.NoError(t, os.WriteFile(path, []byte(content), 0o644))
	}
	p := mustNew(t, h.config)
	p.host = hostprobe.Host{Root: root, Extension: func(c int) (int, error) { return h.extensions[c], h.kvm }}
	if path, ok := strings.CutPrefix(h.config.QuoteSocket, "unix:"); ok && strings.HasPrefix(path, "/run/") {
		require.NoError(t, os.MkdirAll(filepath.Join(root, "run"), 0o755))
		l, err := net.Listen("unix", filepath.Join(root, path))
		require.NoError(t, err)
		t.Cleanup(func() { l.Close() })
	}
	return p.Probe(context.Background(), h.host)
}

func TestProbeOfAWholeHost(t *testing.T) {
	h := wholeHost(t)
	h.config.QuoteSocket = "unix:/run/q"
	findings := h.probe(t)
	var order []string
	for _, f := range findings {
		order = append(order, f.What)
		require.Equal(t, tee.OK, f.Result, "%+v", f)
		require.NotEmpty(t, f.Detail)
	}
	require.Equal(t, []string{
		"Intel CPU", "kvm_intel parameter tdx", "KVM's VM types", "KVM_CAP_MEMORY_ATTRIBUTES", "KVM_CAP_GUEST_MEMFD",
		"KVM_CAP_X86_APIC_BUS_CYCLES_NS",
		"Quote Generation Service", "VMM", "firmware with TDX metadata", "free TDX key ids",
	}, order)
	require.NoError(t, tee.Supported(tee.TDX, findings))
}

func TestProbeNamesWhatIsMissing(t *testing.T) {
	for name, tt := range map[string]struct {
		change func(h *fakeHost)
		what   string
		detail string
		result tee.Result
	}{
		"AMD":      {func(h *fakeHost) { h.files["proc/cpuinfo"] = "vendor_id : AuthenticAMD\n" }, "Intel CPU", "AuthenticAMD", tee.Missing},
		"no /proc": {func(h *fakeHost) { delete(h.files, "proc/cpuinfo") }, "Intel CPU", "cannot be read", tee.Missing},
		"switched off": {func(h *fakeHost) { h.files["sys/module/kvm_intel/parameters/tdx"] = "N" }, "kvm_intel parameter tdx", `"N"`,
			tee.Missing},
		"no module": {func(h *fakeHost) { delete(h.files, "sys/module/kvm_intel/parameters/tdx") }, "kvm_intel parameter tdx", "not loaded",
			tee.Missing},
		"old module": {func(h *fakeHost) {
			delete(h.files, "sys/module/kvm_intel/parameters/tdx")
			h.files["sys/module/kvm_intel/version"] = ""
		}, "kvm_intel parameter tdx", "no such parameter", tee.Missing},
		"emulation": {func(h *fakeHost) { h.host.Accelerator = hypervisor.AccelTCG }, "accelerator", `"tcg"`, tee.Missing},
		"no KVM":    {func(h *fakeHost) { h.kvm = errors.New("gone") }, "KVM's VM types", "gone", tee.Missing},
		"no VM type": {func(h *fakeHost) { h.extensions[hostprobe.CapVMTypes] = 1 }, "KVM's VM types",
			"offers VM types {default}; TDX needs type 5", tee.Missing},
		"SNP only": {func(h *fakeHost) { h.extensions[hostprobe.CapVMTypes] = 0x11 }, "KVM's VM types", "{default, SEV-SNP}", tee.Missing},
		"no attributes": {func(h *fakeHost) { h.extensions[hostprobe.CapMemoryAttributes] = 1 }, "KVM_CAP_MEMORY_ATTRIBUTES", "answers 1",
			tee.Missing},
		"no guest_memfd": {func(h *fakeHost) { delete(h.extensions, hostprobe.CapGuestMemfd) }, "KVM_CAP_GUEST_MEMFD", "answers 0", tee.Missing},
		"no bus cycles": {func(h *fakeHost) { delete(h.extensions, hostprobe.CapX86APICBusCyclesNS) }, "KVM_CAP_X86_APIC_BUS_CYCLES_NS",
			"answers 0", tee.Missing},
		"no quotes": {func(h *fakeHost) { h.config.QuoteSocket = "" }, "Quote Generation Service", "cannot be attested", tee.Note},
		"QGS down": {func(h *fakeHost) { h.config.QuoteSocket = "unix:/none/qgs" }, "Quote Generation Service",
			"/none/qgs is not there: guests start but cannot be attested", tee.Note},
		"QGS by vsock": {func(h *fakeHost) { h.config.QuoteSocket = "vsock:2:4050" }, "Quote Generation Service", "CID 2 port 4050", tee.Note},
		"no QEMU":      {func(h *fakeHost) { h.host.VMM = nil }, "VMM", "none was found", tee.Missing},
		"old QEMU":     {func(h *fakeHost) { h.host.VMM = vmm("no tdx-guest") }, "VMM", "no tdx-guest", tee.Missing},
		"no firmware":  {func(h *fakeHost) { h.config.Firmware = "/none" }, "firmware with TDX metadata", "/none is not there", tee.Missing},
		"not accepted": {func(h *fakeHost) { h.config.Digests = nil }, "firmware with TDX metadata", "SHA-256 digest", tee.Missing},
		"keys in use":  {func(h *fakeHost) { h.files["sys/fs/cgroup/misc.current"] = "tdx 31" }, "free TDX key ids", "all 31", tee.Missing},
		"keys unknown": {func(h *fakeHost) { delete(h.files, "sys/fs/cgroup/misc.capacity") }, "free TDX key ids", "does not count", tee.Note},
		"keys broken":  {func(h *fakeHost) { h.files["sys/fs/cgroup/misc.current"] = "tdx x" }, "free TDX key ids", "cannot be read", tee.Note},
	} {
		t.Run(name, func(t *testing.T) {
			h := wholeHost(t)
			tt.change(h)
			findings := h.probe(t)
			var hit *tee.Finding
			for _, f := range findings {
				require.Equal(t, f.Result == tee.Missing, f.Fix != "", "%+v", f)
				if f.What == tt.what {
					hit = &f
				} else {
					require.NotEqual(t, tee.Missing, f.Result, "%+v", f)
				}
			}
			require.NotNil(t, hit, "%+v", findings)
			require.Equal(t, tt.result, hit.Result, "%+v", hit)
			require.Contains(t, hit.Detail, tt.detail)
			err := tee.Supported(tee.TDX, findings)
			if tt.result == tee.Missing {
				require.ErrorIs(t, err, errdefs.ErrFailedPrecondition)
			} else {
				require.NoError(t, err)
			}
		})
	}
}

func TestProbeTellsOfEnrolledKeys(t *testing.T) {
	h := wholeHost(t)
	raw, err := os.ReadFile(h.config.Firmware)
	require.NoError(t, err)
	copy(raw[volumeHeaderSize+storeHeaderSize:], "\xaa\x55")
	require.NoError(t, os.WriteFile(h.config.Firmware, raw, 0o644))
	_, digest, err := firmware.ReadFile(h.config.Firmware, firmware.MaxSize)
	require.NoError(t, err)
	h.config.Digests = []string{digest}
	found := false
	for _, f := range h.probe(t) {
		found = found || f.What == "Secure Boot" && f.Result == tee.Note
	}
	require.True(t, found)
}

// vmm lacks something of the platform; "": nothing.
func vmm(lacks string) *hypervisor.Capabilities {
	return &hypervisor.Capabilities{Platforms: map[abi.Platform]string{tee.TDX: lacks}}
}
