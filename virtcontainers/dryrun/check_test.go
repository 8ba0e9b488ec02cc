// SPDX-License-Identifier: Apache-2.0

package dryrun

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/cloister-project/cloister/hypervisor"
	"github.com/cloister-project/cloister/tee"
	"github.com/cloister-project/cloister/virtcontainers/vmplan"
)

func about(findings []Finding, what string) (all []Finding) {
	for _, f := range findings {
		if f.What == what {
			all = append(all, f)
		}
	}
	return all
}

// A node without hardware and with a VMM that does not run: the VMM has one line on every platform, with its own words, and
// every line that something is missing has a fix. Nothing is made.
func TestCheckOfANodeThatLacksAll(t *testing.T) {
	config := newNode(t, "")
	r := Check(t.Context(), config, AllPlatforms)
	require.False(t, r.Usable)
	require.Len(t, r.Platforms, len(tee.Names()))
	for _, p := range r.Platforms {
		assert.False(t, p.Usable)
		assert.Equal(t, p.Platform == tee.None, p.Configured)
		vmm := about(p.Findings, whatVMM)
		require.Len(t, vmm, 1, "%s: %+v", p.Platform, p.Findings)
		assert.Equal(t, Bad, vmm[0].Result)
		if p.Platform != tee.SE { // there no QEMU for s390x is looked at
			assert.Contains(t, vmm[0].Detail, "out of order")
		}
		for _, f := range p.Findings {
			assert.NotContains(t, f.Detail, "\n")
			assert.Equal(t, f.Result == Bad, f.Fix != "" && f.Result != Note, "%+v", f)
		}
		assert.Empty(t, about(p.Findings, "launch"), "what is missing is told, not what comes of it")
	}
	left, err := filepath.Glob(filepath.Join(filepath.Dir(config), "*"))
	require.NoError(t, err)
	assert.Len(t, left, 5, "%v", left)
}

func TestCheckOfFaults(t *testing.T) {
	r := Check(t.Context(), newNode(t, "nonsense = 1\n[log]\nlevel = 'loud'"), "")
	assert.False(t, r.Usable)
	assert.Len(t, r.Node, 2)
	assert.Contains(t, r.Node[0].Detail, ".toml:")
	assert.NotNil(t, r.Platforms, "a list in JSON, if an empty one")

	// What contradicts a platform is told once, and the host is looked at all the same.
	for _, tc := range []struct {
		name, more string
		platform   tee.Name
		want       string
		host       string
	}{
		{"console", "[log]\ndebug_console = true", tee.SNP, "log.debug_console", "CPU with SEV-SNP"},
		{"architecture", "", tee.SE, "hypervisor.arch", "machine"},
		{"no image", "", tee.SE, "tee.se.image", "machine"},
		{"initdata for nobody", "initdata = '/gone.toml'", tee.None, "initdata is given", "protection"},
		{"initdata is gone", "initdata = '/gone.toml'", tee.SNP, "/gone.toml", "CPU with SEV-SNP"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			p := checkPlatform(t.Context(), load(t, newNode(t, tc.more), ""+string(tc.platform)), tc.platform)
			found := slices.ContainsFunc(about(p.Findings, "configuration"), func(f Finding) bool { return strings.Contains(f.Detail, tc.want) })
			assert.True(t, found, "%+v", p.Findings)
			assert.NotEmpty(t, about(p.Findings, tc.host), "%+v", p.Findings)
			assert.NotEmpty(t, about(p.Findings, "vsock"))
		})
	}

	cfg := load(t, newNode(t, ""), "snp")
	cfg.TEE.SNP.Policy, cfg.TEE.TDX.Attributes = 0xb0000, 1
	cfg.Hypervisor.CPUModel, cfg.Hypervisor.Vsock = "max", "vhost-user"
	for name, host := range map[tee.Name]string{tee.SNP: "CPU with SEV-SNP", tee.TDX: "Intel CPU", tee.SE: "machine"} {
		p := checkPlatform(t.Context(), cfg, name)
		assert.NotEmpty(t, about(p.Findings, "configuration"), "%s: %+v", name, p.Findings)
		assert.NotEmpty(t, about(p.Findings, host), "%s: %+v", name, p.Findings)
	}
}

func TestCheckFilesOfANode(t *testing.T) {
	config := newNode(t, "")
	dir := filepath.Dir(config)
	require.NoError(t, os.Remove(filepath.Join(dir, "initrd")))
	require.NoError(t, os.Remove(filepath.Join(dir, "qemu")))
	p := checkPlatform(t.Context(), load(t, config, "none"), tee.None)
	files := about(p.Findings, "files")
	require.Len(t, files, 1, "the VMM has a line of its own: %+v", files)
	assert.Contains(t, files[0].Detail, filepath.Join(dir, "initrd"))
	assert.Len(t, about(p.Findings, whatVMM), 1)
}

// The transport is the plan's choice.
func TestCheckVsock(t *testing.T) {
	for setting, want := range map[string]hypervisor.VsockKind{"vhost": hypervisor.VsockVhost, "vhost-user": hypervisor.VsockVhostUser} {
		cfg := load(t, newNode(t, ""), "none")
		cfg.Hypervisor.Vsock = setting
		plan, err := planHost(cfg)
		require.NoError(t, err)
		require.Equal(t, want, plan.VsockKind())
		f := checkVsock(plan)
		switch _, err := os.Stat(vmplan.VhostVsockDevice); {
		case want == hypervisor.VsockVhostUser:
			assert.Equal(t, Finding{What: "vsock", Result: Good, Detail: "the shim's own vhost-user device"}, f)
		case err != nil:
			assert.Equal(t, Bad, f.Result)
			assert.Contains(t, f.Detail, vmplan.VhostVsockDevice)
		}
	}
}

// A configuration that every pod is refused for must not look usable.
func TestCheckLaunch(t *testing.T) {
	cfg := load(t, newNode(t, ""), "none")
	cfg.Hypervisor.KernelParams = []string{"cloister.tee=snp"}
	f := checkLaunch(t.Context(), cfg)
	assert.Equal(t, Bad, f.Result)
	assert.Contains(t, f.Detail, "hypervisor.kernel_params")
	assert.NotEmpty(t, f.Fix)

	f = checkLaunch(t.Context(), load(t, newNode(t, ""), "snp"))
	assert.Equal(t, Bad, f.Result, "the node's VMM does not run")
	assert.Contains(t, f.Detail, "out of order")
	assert.Contains(t, f.Fix, "VMM")
}

// With a VMM that runs.
func TestCheckOfAVMM(t *testing.T) {
	qemu := os.Getenv("CLOISTER_TEST_QEMU")
	if qemu == "" {
		t.Skip("CLOISTER_TEST_QEMU names no QEMU; the Makefile's targets set it")
	}
	for _, name := range []tee.Name{tee.None, tee.SNP} {
		cfg := load(t, newNode(t, ""), string(name))
		cfg.Hypervisor.Path = qemu
		p := checkPlatform(t.Context(), cfg, name)
		vmm := about(p.Findings, whatVMM)
		require.Len(t, vmm, 1, "%+v", p.Findings)
		assert.Contains(t, vmm[0].Detail, qemu)
		features := about(p.Findings, "VMM's features")
		require.Len(t, features, 1)
		assert.Contains(t, features[0].Detail, "pc-q35")
		assert.Len(t, about(p.Findings, "accelerator"), map[tee.Name]int{tee.None: 1}[name])
	}
	cfg := load(t, newNode(t, ""), "none")
	cfg.Hypervisor.Path = qemu
	f := checkLaunch(t.Context(), cfg)
	assert.Equal(t, Good, f.Result, f.Detail)
	assert.Contains(t, f.Detail, "a pod would get 1 CPU of model ")
}

func TestOneLine(t *testing.T) {
	assert.Equal(t, "a; b c", oneLine("a\nb   c"))
	assert.NotContains(t, oneLine("\n\n"), "\n")
}

// A VMM whose confinement this host lacks is no use unless the configuration does without it.
func TestCheckOfTheSandbox(t *testing.T) {
	can := hypervisor.Capabilities{Binary: "/vmm", Version: "vmm v1", Sandbox: "no landlock"}
	cfg := load(t, newNode(t, ""), "none")
	for wanted, missing := range map[bool]int{true: 1, false: 0} {
		cfg.Hypervisor.Sandbox = wanted
		findings, asked := checkVMM(t.Context(), fakeDriver{can: can}, cfg, tee.None)
		require.True(t, asked)
		assert.Equal(t, missing, Missing(findings), "%+v", findings)
		for _, f := range findings {
			assert.NotEmpty(t, f.Detail, "%+v", f)
		}
	}
}
