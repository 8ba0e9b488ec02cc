// SPDX-License-Identifier: Apache-2.0

package configs

import (
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	runtimeoptions "github.com/containerd/containerd/api/types/runtimeoptions/v1"
	"github.com/containerd/typeurl/v2"
	"github.com/pelletier/go-toml/v2"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/cloister-project/cloister/tee/abi"
)

func TestTEEDefaults(t *testing.T) {
	c, err := Defaults()
	require.NoError(t, err)
	assert.Equal(t, TEE{
		Platform:            "none",
		FirmwareDescriptors: []string{"/etc/qemu/firmware", "/usr/share/qemu/firmware"},
		SwiotlbMiB:          64,
		SNP: TEESNP{
			FirmwareDigests: []string{"3e4fd0b3fe3b2dbe481c3d9e99418a034174f26cbe1f55aa212b0f18c12d2d6f"},
			Policy:          0x30000, GuestFeatures: 1,
		},
		TDX: TEETDX{FirmwareDigests: []string{}, Attributes: 1 << 28},
	}, c.TEE)
	assert.Empty(t, c.Hypervisor.Arch)
	assert.Equal(t, runtime.GOARCH, c.Architecture())
}

func TestTEEValues(t *testing.T) {
	id, digest := strings.Repeat("0a", 16), strings.Repeat("0B", 48)
	dir := write(t, map[string]string{"c.toml": `
hypervisor.arch = "amd64"
[tee]
platform = "snp"
firmware_descriptors = ["/a", "/b"]
initdata = "/i"
allow_debug = true
swiotlb_mib = 0
[tee.snp]
firmware = "/f"
firmware_digests = []
policy = "0xffffffffffffffff"
guest_features = 33
id_key = "/k"
author_key = "/a"
family_id = "` + id + `"
image_id = ""
guest_svn = 4294967295
[tee.tdx]
firmware = "/g"
attributes = 0b11
quote_socket = "vsock:2:4050"
mrowner = "` + digest + `"
[tee.se]
image = "/s"
`})
	c, err := Load(filepath.Join(dir, "c.toml"))
	require.NoError(t, err)
	assert.Equal(t, TEE{
		Platform: "snp", FirmwareDescriptors: []string{"/a", "/b"}, Initdata: "/i", AllowDebug: true,
		SNP: TEESNP{Firmware: "/f", FirmwareDigests: []string{}, Policy: 1<<64 - 1, GuestFeatures: 33, IDKey: "/k", AuthorKey: "/a", FamilyID: id,
			GuestSVN: 1<<32 - 1},
		TDX: TEETDX{Firmware: "/g", FirmwareDigests: []string{}, Attributes: 3, QuoteSocket: "vsock:2:4050", MROwner: digest},
		SE:  TEESE{Image: "/s"},
	}, c.TEE)
}

func TestBadTEEValues(t *testing.T) {
	for _, tc := range []struct{ name, toml, key, reason, fix string }{
		{"arch", "hypervisor.arch = 'x86_64'", "hypervisor.arch", `"x86_64"`, `"amd64" or "s390x"`},
		{"platform", "tee.platform = 'sev'", "tee.platform", `"sev"`, `"none", "sample", "snp", "tdx" or "se"`},
		{"platform in capitals", "tee.platform = 'SNP'", "tee.platform", `"SNP"`, `"snp"`},
		{"no platform", "tee.platform = ''", "tee.platform", `""`, `"none"`},
		{"list of platforms", "tee.platform = ['snp']", "tee.platform", "list", "text"},
		{"unknown key", "tee.debug = true", "tee.debug", "not a key", "allow_debug"},
		{"unknown key of a platform", "tee.snp.debug = true", "tee.snp.debug", "not a key", "guest_features"},
		{"firmware", "tee.snp.firmware = 'OVMF.fd'", "tee.snp.firmware", "absolute", "/"},
		{"descriptors", "tee.firmware_descriptors = ['/a', 'b']", "tee.firmware_descriptors", "entry 2", "/"},
		{"short digest", "tee.snp.firmware_digests = ['00']", "tee.snp.firmware_digests", "entry 1", "64 digits"},
		{"digest with prefix", "tee.tdx.firmware_digests = ['sha256:" + strings.Repeat("0", 57) + "']", "tee.tdx.firmware_digests", "hexadecimal",
			"64 digits"},
		{"initdata", "tee = {platform = 'sample', initdata = 'x'}", "tee.initdata", "absolute", "/"},
		{"swiotlb", "tee.swiotlb_mib = 1025", "tee.swiotlb_mib", "1025", "0 to 1024"},
		{"negative swiotlb", "tee.swiotlb_mib = -1", "tee.swiotlb_mib", "-1", "0 to 1024"},
		{"policy in words", "tee.snp.policy = 'debug'", "tee.snp.policy", `"debug"`, "0x30000"},
		{"policy of 65 bits", "tee.snp.policy = '0x10000000000000000'", "tee.snp.policy", "64 bits", "0x30000"},
		{"negative policy", "tee.snp.policy = -1", "tee.snp.policy", "negative", "0x30000"},
		{"fraction as policy", "tee.snp.policy = 1.5", "tee.snp.policy", "fraction", "0x30000"},
		{"features", "tee.snp.guest_features = true", "tee.snp.guest_features", "true", "0x30000"},
		{"id key", "tee.snp.id_key = 'k'", "tee.snp.id_key", "absolute", "/"},
		{"family id", "tee.snp.family_id = '00'", "tee.snp.family_id", "16 bytes", "32 digits"},
		{"image id", "tee.snp.image_id = '" + strings.Repeat("g", 32) + "'", "tee.snp.image_id", "hexadecimal", "32 digits"},
		{"svn", "tee.snp.guest_svn = 4294967296", "tee.snp.guest_svn", "out of range", "4294967295"},
		{"mrowner", "tee.tdx.mrowner = '00'", "tee.tdx.mrowner", "48 bytes", "96 digits"},
		{"mrownerconfig", "tee.tdx.mrownerconfig = 'x'", "tee.tdx.mrownerconfig", "48 bytes", "96 digits"},
		{"image", "tee.se.image = 'x'", "tee.se.image", "absolute", "/"},
		{"cloister's own parameter", "hypervisor.kernel_params = ['quiet', 'cloister.tee=none']", "hypervisor.kernel_params", "entry 2",
			"remove"},
		{"agent's own parameter", "hypervisor.kernel_params = ['cloister.debug']", "hypervisor.kernel_params", "entry 1", "remove"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, err := Load(filepath.Join(write(t, map[string]string{"c.toml": tc.toml}), "c.toml"))
			fs := faultsOf(t, err)
			require.Len(t, fs, 1, "%v", err)
			assert.Equal(t, tc.key, fs[0].Key)
			assert.Contains(t, fs[0].Reason, tc.reason)
			assert.Contains(t, fs[0].Fix, tc.fix)
		})
	}
}

// A node's file may have what only some of its handlers use.
func TestInitdataForSomeHandlers(t *testing.T) {
	c, err := Load(filepath.Join(write(t, map[string]string{"c.toml": "tee.initdata = '/x'"}), "c.toml"))
	require.NoError(t, err)
	c, err = c.WithPlatform("sample")
	require.NoError(t, err)
	assert.Equal(t, "/x", c.TEE.Initdata)
}

func TestWithPlatform(t *testing.T) {
	c, err := Load(filepath.Join(write(t, map[string]string{"c.toml": "tee.se.image = '/se.img'\nlog.debug_console = true"}), "c.toml"))
	require.NoError(t, err)
	_, err = c.WithPlatform("sgx")
	fs := faultsOf(t, err)
	assert.Equal(t, Fault{File: "command line", Key: "tee.platform", Reason: `"sgx" is not known`,
		Fix: `give "none", "sample", "snp", "tdx" or "se"`}, fs[0])

	for name, arch := range map[string]string{"snp": ArchAMD64, "tdx": ArchAMD64, "se": ArchS390X, "sample": runtime.GOARCH,
		"none": runtime.GOARCH} {
		n, err := c.WithPlatform(name)
		require.NoError(t, err)
		assert.Equal(t, name, n.TEE.Platform)
		assert.Equal(t, arch, n.Architecture(), name)
	}
	assert.Equal(t, "none", c.TEE.Platform)
	c.Hypervisor.Arch = ArchAMD64
	n, err := c.WithPlatform("se")
	require.NoError(t, err)
	assert.Equal(t, ArchAMD64, n.Architecture(), "what somebody set is not overruled")
}

func TestInitdataAnnotations(t *testing.T) {
	const own, kata = AnnotationInitdata, AnnotationKataInitdata
	conf := func(platform string, allowed ...string) *Config {
		c, err := Defaults()
		require.NoError(t, err)
		c.TEE.Platform, c.TEE.Initdata, c.Annotations.Allowed = platform, "/node.toml", allowed
		return c
	}
	big := strings.Repeat("A", maxInitdataBytes)
	for _, tc := range []struct {
		name    string
		allowed []string
		pod     map[string]string
		want    string
	}{
		{"none listed, none given", nil, map[string]string{"x": "y"}, ""},
		{"one listed", []string{kata}, map[string]string{own: "eQ==", kata: "eQ=="}, "eQ=="},
		{"both the same", []string{own, kata}, map[string]string{own: "eA==", kata: "eA=="}, "eA=="},
		{"as long as can be", []string{own}, map[string]string{own: big}, big},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c := conf("sample", tc.allowed...)
			n, err := c.ApplyAnnotations(tc.pod)
			require.NoError(t, err)
			assert.Equal(t, tc.want, n.TEE.InitdataAnnotation)
			assert.Empty(t, c.TEE.InitdataAnnotation)
			assert.Equal(t, "/node.toml", n.TEE.Initdata)
		})
	}
	for _, tc := range []struct {
		name, platform string
		pod            map[string]string
		key, reason    string
	}{
		{"too long", "sample", map[string]string{own: big + "A"}, own, "262145 bytes"},
		{"empty", "sample", map[string]string{own: ""}, own, "empty"},
		{"different", "sample", map[string]string{own: "eA==", kata: "eQ=="}, kata, "differs"},
		{"ordinary VM", "none", map[string]string{kata: "eA=="}, kata, "nothing binds"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, err := conf(tc.platform, own, kata).ApplyAnnotations(tc.pod)
			fs := faultsOf(t, err)
			require.Len(t, fs, 1)
			assert.Equal(t, tc.key, fs[0].Key)
			assert.Contains(t, fs[0].Reason, tc.reason)
		})
	}
	_, err := conf("sample").ApplyAnnotations(map[string]string{own: "eA==", kata: "eA=="})
	require.Len(t, faultsOf(t, err), 2, "a confidential pod does not run without its initdata")
	_, err = conf("sample", own).ApplyAnnotations(map[string]string{own: "eA==", kata: "eQ=="})
	fs := faultsOf(t, err)
	require.Len(t, fs, 1, "nor with another")
	assert.Equal(t, kata, fs[0].Key)
	assert.Contains(t, fs[0].Fix, "annotations.allowed")
	_, err = conf("none").ApplyAnnotations(map[string]string{own: "eA=="})
	require.NoError(t, err, "an ordinary pod's has no effect, as any other that is not listed")
	assert.Equal(t, []string{own, kata}, conf("sample").IgnoredAnnotations(map[string]string{own: "", kata: "",
		"io.katacontainers.other": ""}))
}

// A confidential VM's command line is measured, and the same for all pods.
func TestKernelParamsOfAConfidentialPod(t *testing.T) {
	const key = AnnotationPrefix + "hypervisor.kernel-params"
	c, err := Defaults()
	require.NoError(t, err)
	c.Annotations.Allowed = []string{key}
	n, err := c.ApplyAnnotations(map[string]string{key: "loglevel=7"})
	require.NoError(t, err)
	assert.Equal(t, []string{"loglevel=7"}, n.Hypervisor.KernelParams)
	_, err = c.ApplyAnnotations(map[string]string{key: "cloister.tee=none"})
	require.ErrorContains(t, err, "set by Cloister itself")
	c.TEE.Platform = "sample"
	_, err = c.ApplyAnnotations(map[string]string{key: "loglevel=7"})
	require.ErrorContains(t, err, "measured")
}

// Each drop-in is what an operator copies: it must load over the defaults and give its platform.
func TestPlatformDropIns(t *testing.T) {
	for _, name := range platforms()[1:] {
		data, err := PlatformDropIn(name)
		require.NoError(t, err)
		arch := abi.Platform(name).Architecture()
		if arch == "" {
			arch = runtime.GOARCH
		}
		dir := write(t, map[string]string{"c.toml": "hypervisor.arch = '" + arch + "'", "config.d/10-tee.toml": string(data)})
		c, err := Load(filepath.Join(dir, "c.toml"))
		require.NoError(t, err)
		assert.Equal(t, name, c.TEE.Platform)
		assert.Equal(t, []string{AnnotationInitdata, AnnotationKataInitdata}, c.Annotations.Allowed)
	}
	_, err := PlatformDropIn("none")
	require.Error(t, err)
	_, err = PlatformDropIn("../cloister")
	require.Error(t, err)
}

// The options of each handler in the snippet, given to the shim as containerd gives them.
func TestSnippetHandlers(t *testing.T) {
	data, err := os.ReadFile("containerd-config.toml")
	require.NoError(t, err)
	var conf struct {
		Plugins map[string]struct {
			Containerd struct {
				Runtimes map[string]struct {
					Annotations []string       `toml:"pod_annotations"`
					Options     map[string]any `toml:"options"`
				} `toml:"runtimes"`
			} `toml:"containerd"`
		} `toml:"plugins"`
	}
	require.NoError(t, toml.Unmarshal(data, &conf))
	classes, err := os.ReadFile("runtimeclass.yaml")
	require.NoError(t, err)
	runtimes := conf.Plugins["io.containerd.cri.v1.runtime"].Containerd.Runtimes
	assert.Len(t, runtimes, 6)
	for _, name := range platforms() {
		handler := "cloister-" + name
		if name == string(abi.None) {
			handler = "cloister"
		}
		assert.Contains(t, string(classes), "\nhandler: "+handler+"\n")
		assert.Contains(t, string(classes), "\n  name: "+handler+"\n")
		r, ok := runtimes[handler]
		require.True(t, ok, handler)
		body, err := toml.Marshal(r.Options)
		require.NoError(t, err)
		options, err := typeurl.MarshalAnyToProto(&runtimeoptions.Options{ConfigBody: body})
		require.NoError(t, err)
		arch := abi.Platform(name).Architecture()
		if arch == "" {
			arch = runtime.GOARCH
		}
		node := filepath.Join(write(t, map[string]string{"node.toml": "hypervisor.arch = '" + arch +
			"'\nsizing.default_vcpus = 3\ntee.se.image = '/se.img'"}), "node.toml")
		c, err := fromOptions(options, "", node)
		require.NoError(t, err)
		assert.Equal(t, name, c.TEE.Platform)
		assert.Equal(t, 3, c.Sizing.DefaultVCPUs, "the node's own file holds for every handler")
		if name != string(abi.None) {
			assert.Contains(t, r.Annotations, AnnotationKataInitdata)
		}
	}
}
