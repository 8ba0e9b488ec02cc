// SPDX-License-Identifier: Apache-2.0

package platform

import (
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/cloister-project/cloister/configs"
	"github.com/cloister-project/cloister/tee"
)

// load is the configuration of a file.
func load(t *testing.T, toml string) *configs.Config {
	t.Helper()
	path := filepath.Join(t.TempDir(), "c.toml")
	require.NoError(t, os.WriteFile(path, []byte(toml), 0o600))
	c, err := configs.Load(path)
	require.NoError(t, err)
	return c
}

// forPlatform sets the architecture that a platform is of, where the text does not.
func forPlatform(c *configs.Config) *configs.Config {
	if c.Hypervisor.Arch == "" {
		c.Hypervisor.Arch = tee.Name(c.TEE.Platform).Architecture()
	}
	return c
}

// What a platform makes of values whose form is right: one fault each, that names the key with file and line.
func TestFaultsNameTheKey(t *testing.T) {
	for _, tc := range []struct{ name, toml, key, reason, fix string }{
		{"debug policy", "tee = {platform = 'snp', snp.policy = 0xb0000}", "tee.snp.policy", "0xb0000: bit 19", "allow_debug"},
		{"author key alone", "tee = {platform = 'snp', snp.author_key = '/k'}", "tee.snp.author_key", "without tee.snp.id_key", "both"},
		{"debug attribute", "tee = {platform = 'tdx', tdx.attributes = 0x10000001}", "tee.tdx.attributes", "bit 0", "allow_debug"},
		{"quote socket without kind", "tee = {platform = 'tdx', tdx.quote_socket = '/run/qgs'}", "tee.tdx.quote_socket", "no known kind",
			"unix:"},
		{"relative quote socket", "tee = {platform = 'tdx', tdx.quote_socket = 'unix:qgs'}", "tee.tdx.quote_socket", "absolute", "unix:"},
		{"long quote socket", "tee = {platform = 'tdx', tdx.quote_socket = 'unix:/" + strings.Repeat("x", 107) + "'}", "tee.tdx.quote_socket",
			"more than 107 bytes", "unix:"},
		{"vsock without port", "tee = {platform = 'tdx', tdx.quote_socket = 'vsock:2'}", "tee.tdx.quote_socket", "CID and port",
			"vsock:CID:PORT"},
		{"vsock with a name", "tee = {platform = 'tdx', tdx.quote_socket = 'vsock:host:1'}", "tee.tdx.quote_socket", "CID and port",
			"vsock:CID:PORT"},
		{"debug console", "tee.platform = 'sample'\nlog.debug_console = true", "log.debug_console", "console", "false"},
		{"emulated hardware", "tee.platform = 'snp'\nhypervisor = {accel = 'tcg', arch = 'amd64'}", "hypervisor.accel", "protects nothing",
			`"kvm"`},
		{"snp on s390x", "tee.platform = 'snp'\nhypervisor.arch = 's390x'", "hypervisor.arch", "s390x", "architecture"},
		{"tdx on s390x", "tee.platform = 'tdx'\nhypervisor.arch = 's390x'", "hypervisor.arch", "s390x", "architecture"},
		{"se on amd64", "tee = {platform = 'se', se.image = '/x'}\nhypervisor.arch = 'amd64'", "hypervisor.arch", "amd64", "architecture"},
		{"se without image", "tee.platform = 'se'\nhypervisor.arch = 's390x'", "tee.se.image", "empty", "cloister image se build"},
		{"se over PCI", "tee = {platform = 'se', se.image = '/x'}\nhypervisor = {arch = 's390x', vsock = 'vhost-user'}", "hypervisor.vsock",
			"PCI", "vhost"},
		{"se with a CPU model", "tee = {platform = 'se', se.image = '/x'}\nhypervisor = {arch = 's390x', cpu_model = 'z15'}",
			"hypervisor.cpu_model", "z15", "host"},
		{"snp with the host's CPU", "tee.platform = 'snp'\nhypervisor = {arch = 'amd64', cpu_model = 'host,pmu=off'}", "hypervisor.cpu_model",
			"depends on the machine", "EPYC-v4"},
		{"tdx with a CPU model", "tee.platform = 'tdx'\nhypervisor = {arch = 'amd64', cpu_model = 'EPYC-v4'}", "hypervisor.cpu_model", "EPYC-v4",
			"host"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, err := New(forPlatform(load(t, tc.toml)), Options{})
			var faults configs.Faults
			require.ErrorAs(t, err, &faults)
			require.Len(t, faults, 1, "%v", err)
			assert.Equal(t, tc.key, faults[0].Key)
			assert.Contains(t, faults[0].Reason, tc.reason)
			assert.Contains(t, faults[0].Fix, tc.fix)
			if tc.key != "tee.se.image" { // it is not in the file
				assert.NotZero(t, faults[0].Line, "%v", err)
			}
		})
	}
}

// A node's file may have what only some of its handlers use.
func TestOtherPlatformsSettingsAreNotJudged(t *testing.T) {
	_, err := New(load(t, "tee = {initdata = '/x', snp.policy = 0xb0000, tdx.attributes = 1}\nlog.debug_console = true"), Options{})
	require.NoError(t, err)
}

// Where the host's architecture is the fault, the platform's key is named: hypervisor.arch was not set.
func TestPlatformOfAnotherMachine(t *testing.T) {
	text := map[string]string{configs.ArchAMD64: "tee = {platform = 'se', se.image = '/x'}",
		configs.ArchS390X: "tee.platform = 'snp'"}[runtime.GOARCH]
	if text == "" {
		t.Skip("no platform is of another architecture than " + runtime.GOARCH)
	}
	_, err := New(load(t, text), Options{})
	var faults configs.Faults
	require.ErrorAs(t, err, &faults)
	require.Len(t, faults, 1)
	assert.Equal(t, "tee.platform", faults[0].Key)
}

func TestDropInsAreFit(t *testing.T) {
	for _, name := range tee.Names()[1:] {
		text, err := configs.PlatformDropIn(string(name))
		require.NoError(t, err)
		c := forPlatform(load(t, string(text)))
		if name == tee.SE {
			c.TEE.SE.Image = "/se.img"
		}
		p, err := New(c, Options{})
		require.NoError(t, err)
		assert.Equal(t, name, p.Name())
	}
}

// What would weaken a launch, or hide that there is none, is refused for each platform.
func TestSettingsOfALaunch(t *testing.T) {
	for _, tc := range []struct {
		name   string
		on     []tee.Name
		change func(*configs.Config)
		want   string
	}{
		{"nothing", tee.Names(), func(*configs.Config) {}, ""},
		{"debug console", []tee.Name{tee.Sample, tee.SNP, tee.TDX, tee.SE}, func(c *configs.Config) { c.Log.DebugConsole = true },
			"log.debug_console"},
		{"debug console of an ordinary VM", []tee.Name{tee.None}, func(c *configs.Config) { c.Log.DebugConsole = true }, ""},
		{"emulation", []tee.Name{tee.SNP, tee.TDX, tee.SE}, func(c *configs.Config) { c.Hypervisor.Accel = "tcg" },
			"an emulated CPU protects nothing"},
		{"emulation where nothing is protected", []tee.Name{tee.None, tee.Sample}, func(c *configs.Config) { c.Hypervisor.Accel = "tcg" }, ""},
		{"platform by kernel parameter", tee.Names(), kernelParams("quiet", "cloister.tee=none"), "cloister.tee=none"},
		{"platform by a quoted kernel parameter", tee.Names(), kernelParams(`"cloister.tee=none"`), "cloister.tee=none"},
		{"binding by kernel parameter", tee.Names(), kernelParams("cloister.initdata=00"), "cloister.initdata=00"},
		{"initdata without a launch that binds it", []tee.Name{tee.None}, func(c *configs.Config) { c.TEE.Initdata = "/x" }, "initdata is given"},
		{"the pod's initdata without one", []tee.Name{tee.None}, func(c *configs.Config) { c.TEE.InitdataAnnotation = "x" }, "initdata is given"},
	} {
		for _, name := range tc.on {
			t.Run(tc.name+" on "+string(name), func(t *testing.T) {
				cfg := &configs.Config{Hypervisor: configs.Hypervisor{Arch: name.Architecture()}}
				tc.change(cfg)
				faults := LaunchFaults(cfg, name)
				if name.Confidential() {
					faults = append(faults, confidentialFaults(cfg, name)...)
				}
				if tc.want == "" {
					require.Empty(t, faults)
					return
				}
				require.Len(t, faults, 1)
				require.Contains(t, faults[0].String(), tc.want)
			})
		}
	}
}

func kernelParams(params ...string) func(*configs.Config) {
	return func(c *configs.Config) { c.Hypervisor.KernelParams = params }
}
