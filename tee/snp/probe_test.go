// SPDX-License-Identifier: Apache-2.0

package snp

import (
	"context"
	"errors"
	"maps"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/cloister-project/cloister/hypervisor"
	"github.com/cloister-project/cloister/tee"
	"github.com/cloister-project/cloister/tee/abi"
	"github.com/cloister-project/cloister/tee/hostprobe"
)

// goodHost is a tree of files of a host with SEV-SNP.
func goodHost() map[string]string {
	return map[string]string{
		"/proc/cpuinfo":                      "processor\t: 0\nvendor_id\t: AuthenticAMD\n",
		"/sys/module/kvm_amd/parameters/sev": "Y\n", "/sys/module/kvm_amd/parameters/sev_es": "Y\n",
		"/sys/module/kvm_amd/parameters/sev_snp": "Y\n",
		"/dev/sev":                               "",
		"/sys/fs/cgroup/misc.capacity":           "sev 410\nsev_es 99\n", "/sys/fs/cgroup/misc.current": "sev 0\nsev_es 3\n",
	}
}

func goodSEV() (hostprobe.SEVInfo, bool) {
	return hostprobe.SEVInfo{SEV: true, ES: true, SNP: true, CBitPosition: 51, ReducedPhysBits: 1, ASIDs: 509, MinSEVASID: 100}, true
}

const goodTypes = 1<<hostprobe.VMTypeDefault | 1<<hostprobe.VMTypeSNP

func probe(t *testing.T, p *Platform, files map[string]string, types int, h tee.Host) []tee.Finding {
	t.Helper()
	root := t.TempDir()
	for path, content := range files {
		path = filepath.Join(root, path)
		require.NoError(t, os.MkdirAll(filepath.Dir(path), 0o700))
		require.NoError(t, os.WriteFile(path, []byte(content), 0o600))
	}
	p.host = hostprobe.Host{Root: root, Extension: func(capability int) (int, error) {
		require.Equal(t, hostprobe.CapVMTypes, capability)
		if types < 0 {
			return 0, errors.New("no /dev/kvm")
		}
		return types, nil
	}}
	return p.Probe(context.Background(), h)
}

func TestProbeOfAHostThatHasAll(t *testing.T) {
	s := newSetup(t)
	s.withKeys(t)
	p := s.platform(t)
	p.sev = goodSEV
	findings := probe(t, p, goodHost(), goodTypes, tee.Host{Accelerator: hypervisor.AccelKVM, VMM: vmm("")})
	var order []string
	for _, f := range findings {
		require.Equal(t, tee.OK, f.Result, "%+v", f)
		require.NotEmpty(t, f.Detail)
		order = append(order, f.What)
	}
	require.Equal(t, []string{"CPU with SEV-SNP", "kvm_amd's parameter sev", "kvm_amd's parameter sev_es", "kvm_amd's parameter sev_snp",
		"/dev/sev",
		"KVM's VM type SEV-SNP", "VMM", "firmware", "keys of the ID block", "free ASIDs"}, order)
	require.Equal(t, "96 of 99", findings[9].Detail)
	require.NoError(t, tee.Supported(tee.SNP, findings))
}

func TestProbeNamesWhatIsMissing(t *testing.T) {
	with := func(path, content string) func(*probeCase) {
		return func(c *probeCase) { c.files[path] = content }
	}
	for _, tt := range []struct {
		what, detail string
		change       func(*probeCase)
	}{
		{"CPU with SEV-SNP", "the CPU is GenuineIntel's",
			func(c *probeCase) { c.files["/proc/cpuinfo"] = "vendor_id : GenuineIntel\n"; c.sev = noSEV }},
		{"CPU with SEV-SNP", "shows no memory encryption", func(c *probeCase) { c.sev = noSEV }},
		{"CPU with SEV-SNP", "SEV true, SEV-ES true, SEV-SNP false", func(c *probeCase) {
			c.sev = func() (hostprobe.SEVInfo, bool) { return hostprobe.SEVInfo{SEV: true, ES: true}, true }
		}},
		{"kvm_amd's parameter sev", `it is "N"`, with("/sys/module/kvm_amd/parameters/sev", "N\n")},
		{"kvm_amd's parameter sev_snp", "not loaded, or is too old",
			func(c *probeCase) { delete(c.files, "/sys/module/kvm_amd/parameters/sev_snp") }},
		{"/dev/sev", "is not there", func(c *probeCase) { delete(c.files, "/dev/sev") }},
		{"KVM's VM type SEV-SNP", "KVM on this host offers VM types {default}; SEV-SNP needs type 4", func(c *probeCase) { c.types = 1 }},
		{"KVM's VM type SEV-SNP", "no /dev/kvm", func(c *probeCase) { c.types = -1 }},
		{"KVM's VM type SEV-SNP", "the accelerator is tcg", func(c *probeCase) { c.host.Accelerator = hypervisor.AccelTCG }},
		{"VMM", "none was found", func(c *probeCase) { c.host.VMM = nil }},
		{"VMM", "no sev-snp-guest", func(c *probeCase) { c.host.VMM = vmm("no sev-snp-guest") }},
		{"firmware", "since tee.snp.firmware_digests is empty", func(c *probeCase) { c.config.Digests = nil }},
		{"firmware", "no such file", func(c *probeCase) { c.config.Firmware = "/nonexistent" }},
		{"keys of the ID block", "no such file", func(c *probeCase) { c.config.IDKey = "/nonexistent" }},
		{"free ASIDs", "99 of 99 are in use", with("/sys/fs/cgroup/misc.current", "sev_es 99\n")},
	} {
		c := probeCase{setup: newSetup(t), files: maps.Clone(goodHost()), sev: goodSEV, types: goodTypes,
			host: tee.Host{Accelerator: hypervisor.AccelKVM, VMM: vmm("")}}
		tt.change(&c)
		p := c.platform(t)
		p.sev = c.sev
		findings := probe(t, p, c.files, c.types, c.host)
		var missing []tee.Finding
		for _, f := range findings {
			if f.Result == tee.Missing {
				missing = append(missing, f)
			}
		}
		require.Len(t, missing, 1, "%s: %s: %+v", tt.what, tt.detail, missing)
		require.Equal(t, tt.what, missing[0].What)
		require.Contains(t, missing[0].Detail, tt.detail)
		require.NotEmpty(t, missing[0].Fix)
		require.Error(t, tee.Supported(tee.SNP, findings))
	}
}

type probeCase struct {
	setup
	files map[string]string
	sev   func() (hostprobe.SEVInfo, bool)
	types int
	host  tee.Host
}

func TestProbeWithoutCountsOfASIDs(t *testing.T) {
	files := goodHost()
	delete(files, "/sys/fs/cgroup/misc.capacity")
	s := newSetup(t)
	p := s.platform(t)
	p.sev = goodSEV
	findings := probe(t, p, files, goodTypes, tee.Host{VMM: vmm("")})
	require.Equal(t, tee.Note, findings[len(findings)-1].Result)
	require.NoError(t, tee.Supported(tee.SNP, findings))
}

// TestProbeOfThisMachine: whatever it is, each finding says something, and what is missing has a fix.
func TestProbeOfThisMachine(t *testing.T) {
	s := newSetup(t)
	p, err := New(s.config)
	require.NoError(t, err)
	for _, f := range p.Probe(context.Background(), tee.Host{}) {
		require.NotEmpty(t, f.Detail, f.What)
		require.Equal(t, f.Result == tee.Missing, f.Fix != "", f.What)
	}
}

// vmm lacks something of the platform; "": nothing.
func vmm(lacks string) *hypervisor.Capabilities {
	return &hypervisor.Capabilities{Platforms: map[abi.Platform]string{tee.SNP: lacks}}
}
