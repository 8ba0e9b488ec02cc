// SPDX-License-Identifier: Apache-2.0

package configs

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/pelletier/go-toml/v2"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// write makes files below a new directory and returns its path.
func write(t *testing.T, files map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for name, data := range files {
		p := filepath.Join(dir, name)
		require.NoError(t, os.MkdirAll(filepath.Dir(p), 0o755))
		require.NoError(t, os.WriteFile(p, []byte(data), 0o644))
	}
	return dir
}

func faultsOf(t *testing.T, err error) Faults {
	t.Helper()
	var fs Faults
	require.ErrorAs(t, err, &fs)
	assert.True(t, errdefs.IsInvalidArgument(err))
	for _, f := range fs {
		assert.NotEmpty(t, f.File, "%+v", f)
		assert.NotEmpty(t, f.Reason, "%+v", f)
		assert.NotEmpty(t, f.Fix, "%+v", f)
	}
	return fs
}

// The embedded file is the documentation: it has every key, and nothing else.
func TestBaseHasEveryKey(t *testing.T) {
	c, err := load("", filepath.Join(t.TempDir(), "none.toml"), nil)
	require.NoError(t, err)
	for _, s := range settings() {
		o, ok := c.origins[s.key]
		assert.True(t, ok, "%s is not in cloister.toml", s.key)
		assert.Equal(t, builtIn, o.file)
		assert.Positive(t, o.line, s.key)
	}
	for _, k := range AnnotationKeys() {
		assert.Contains(t, string(base), k, "cloister.toml does not document the annotation")
	}
	assert.Equal(t, KindQEMU, c.Hypervisor.Kind)
	assert.Equal(t, 120*time.Second, c.Timeouts.Boot)
	assert.Empty(t, c.Annotations.Allowed)
	assert.True(t, c.Hypervisor.Sandbox)
	assert.Equal(t, 256, c.Sizing.OverheadMemoryMiB)
	assert.Equal(t, "/run/cloister", c.State.Dir)
}

func TestDropInsOverrideInOrder(t *testing.T) {
	dir := write(t, map[string]string{
		"cloister.toml":         "[sizing]\ndefault_vcpus = 2\nmax_vcpus = 8\n[hypervisor]\nkernel_params = [\"a=1\"]\n",
		"config.d/20-b.toml":    "sizing.default_vcpus = 4\nhypervisor.kernel_params = ['b=2', 'c']\n",
		"config.d/10-a.toml":    "sizing = { default_vcpus = 3, hotplug_ports = 2 }\n",
		"config.d/30.toml.bak":  "nonsense",
		"config.d/.hidden.toml": "nonsense",
	})
	path := filepath.Join(dir, "cloister.toml")
	c, err := Load(path)
	require.NoError(t, err)
	assert.Equal(t, 4, c.Sizing.DefaultVCPUs)
	assert.Equal(t, 8, c.Sizing.MaxVCPUs)
	assert.Equal(t, 2, c.Sizing.HotplugPorts)
	assert.Equal(t, []string{"b=2", "c"}, c.Hypervisor.KernelParams)
	assert.Equal(t, 2048, c.Sizing.DefaultMemoryMiB, "keys that no file has keep their defaults")
	assert.Equal(t, origin{filepath.Join(dir, "config.d/20-b.toml"), 1}, c.origins["sizing.default_vcpus"])
	assert.Equal(t, origin{filepath.Join(dir, "config.d/10-a.toml"), 1}, c.origins["sizing.hotplug_ports"])
	assert.Equal(t, origin{path, 3}, c.origins["sizing.max_vcpus"])
}

func TestDropInsWithoutFile(t *testing.T) {
	dir := write(t, map[string]string{"config.d/a.toml": "log.level = 'debug'"})
	c, err := load("", filepath.Join(dir, "cloister.toml"), nil)
	require.NoError(t, err)
	assert.Equal(t, "debug", c.Log.Level)
}

func TestBadValues(t *testing.T) {
	for _, tc := range []struct {
		name, toml string
		key        string
		line       int
		reason     string
		fix        string
	}{
		{"unknown key", "[sizing]\n\nvcpus = 2", "sizing.vcpus", 3, "not a key", "default_vcpus"},
		{"unknown table", "[sizes]\na = 1", "sizes", 1, "not a key", "sizing"},
		{"unknown top key", "debug = true", "debug", 1, "not a key", "hypervisor"},
		{"quoted dotted key", `"sizing.max_vcpus" = 2`, "sizing.max_vcpus", 1, "not a key", "sizing"},
		{"array of tables", "[[sizing]]\nmax_vcpus = 1", "sizing", 1, "is a list", "table"},
		{"table for value", "[sizing.max_vcpus]\na = 1", "sizing.max_vcpus", 1, "is a table", "whole number"},
		{"text for number", "sizing.max_vcpus = '2'", "sizing.max_vcpus", 1, `text "2"`, "whole number"},
		{"fraction", "sizing.max_vcpus = 1.5", "sizing.max_vcpus", 1, "fraction 1.5", "whole number"},
		{"negative", "sizing.max_vcpus = -1", "sizing.max_vcpus", 1, "out of range", "0 or 1 to"},
		{"zero", "sizing.default_vcpus = 0", "sizing.default_vcpus", 1, "out of range", "1 to"},
		{"little memory", "sizing.default_memory_mib = 64", "sizing.default_memory_mib", 1, "64 is out", "256"},
		{"huge", "sizing.max_memory_mib = 9223372036854775807", "sizing.max_memory_mib", 1, "out of range", "67108864"},
		{"number for duration", "timeouts.boot = 30", "timeouts.boot", 1, "number 30", `"30s"`},
		{"not a duration", "timeouts.boot = 'soon'", "timeouts.boot", 1, `"soon"`, `"30s"`},
		{"negative duration", "timeouts.boot = '-5s'", "timeouts.boot", 1, "-5s is out of range", "1s"},
		{"endless duration", "timeouts.stop = '9999h'", "timeouts.stop", 1, "out of range", "24h"},
		{"not a bool", "hypervisor.sandbox = 'on'", "hypervisor.sandbox", 1, `"on"`, "true or false"},
		{"kind", "hypervisor.kind = 'xen'", "hypervisor.kind", 1, `"xen"`, `"qemu"`},
		{"accel", "hypervisor.accel = 'KVM'", "hypervisor.accel", 1, `"KVM"`, `"auto", "kvm" or "tcg"`},
		{"vsock", "hypervisor.vsock = ''", "hypervisor.vsock", 1, `""`, "vhost-user"},
		{"level", "log.level = 'loud'", "log.level", 1, "loud", "trace"},
		{"relative path", "hypervisor.kernel = 'vmlinuz'", "hypervisor.kernel", 1, "absolute", "/"},
		{"empty path", "hypervisor.initrd = ''", "hypervisor.initrd", 1, "absolute", "/"},
		{"unclean path", "hypervisor.path = '/usr/../bin/x'", "hypervisor.path", 1, "clean", "/"},
		{"newline", `hypervisor.kernel = "/a\nb"`, "hypervisor.kernel", 1, "control", "remove"},
		{"long state dir", "state.dir = '/" + strings.Repeat("x", 60) + "'", "state.dir", 1, "61 bytes", "48"},
		{"root as state dir", "state.dir = '/'", "state.dir", 1, `"/"`, "directory"},
		{"cpu model with option", "hypervisor.cpu_model = 'host -drive file=/etc/shadow'", "hypervisor.cpu_model", 1, `' '`, "EPYC"},
		{"params not a list", "hypervisor.kernel_params = 'a b'", "hypervisor.kernel_params", 1, "text", "list"},
		{"param not text", "hypervisor.kernel_params = ['a', 1]", "hypervisor.kernel_params", 1, "entry 2", "text"},
		{"param with space", "hypervisor.kernel_params = ['a b']", "hypervisor.kernel_params", 1, "spaces", "one parameter"},
		{"rdinit", "hypervisor.kernel_params = ['rdinit=/bin/sh']", "hypervisor.kernel_params", 1, "rdinit", "remove"},
		{"end of params", "hypervisor.kernel_params = ['--']", "hypervisor.kernel_params", 1, "--", "remove"},
		{"annotation", "annotations.allowed = ['io.cloister.hypervisor.path']", "annotations.allowed", 1, "not an annotation",
			"io.cloister.sizing.vcpus"},
		{"annotation pattern", "annotations.allowed = ['*']", "annotations.allowed", 1, "not an annotation", "io.cloister.sizing.vcpus"},
		{"default above maximum", "sizing.default_vcpus = 4\nsizing.max_vcpus = 2", "sizing.default_vcpus", 1, "more than sizing.max_vcpus = 2",
			"lower"},
		{"default memory above maximum", "sizing.default_memory_mib = 1024\nsizing.max_memory_mib = 600", "sizing.default_memory_mib", 1,
			"more than sizing.max_memory_mib = 600", "raise"},
		{"overhead above maximum", "sizing.max_memory_mib = 600\nsizing.overhead_memory_mib = 601", "sizing.overhead_memory_mib", 2, "601",
			"lower"},
		{"cache in state", "rootfs.cache_dir = '/run/cloister/x'", "rootfs.cache_dir", 1, "inside", "reboot"},
		{"date", "log.level = 2020-01-01", "log.level", 1, "LocalDate", "text"},
		{"syntax", "[sizing]\nmax_vcpus = = 1", "", 2, "not TOML", "correct"},
		{"double key", "log.level = 'info'\nlog.level = 'debug'", "", 2, "not TOML", "correct"},
		{"not UTF-8", "log.level = '\xff'", "", 1, "not TOML", "correct"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			dir := write(t, map[string]string{"c.toml": tc.toml})
			_, err := Load(filepath.Join(dir, "c.toml"))
			fs := faultsOf(t, err)
			require.Len(t, fs, 1, "%v", err)
			f := fs[0]
			assert.Equal(t, filepath.Join(dir, "c.toml"), f.File)
			if tc.key != "" {
				assert.Equal(t, tc.key, f.Key)
			}
			assert.Equal(t, tc.line, f.Line)
			assert.Contains(t, f.Reason, tc.reason)
			assert.Contains(t, f.Fix, tc.fix)
		})
	}
}

func TestAllFaultsAtOnce(t *testing.T) {
	dir := write(t, map[string]string{
		"c.toml":           "[sizing]\nmax_vcpus = 'x'\nfoo = 1\n[log]\nlevel = 'loud'\n",
		"config.d/1.toml":  "= broken",
		"config.d/2.toml":  "[timeouts]\nboot = 5\n",
		"config.d/3d.toml": "[hypervisor]\naccel = 'fast'\n",
	})
	require.NoError(t, os.Mkdir(filepath.Join(dir, "config.d/4.toml"), 0o755))
	require.NoError(t, syscall.Mkfifo(filepath.Join(dir, "config.d/5.toml"), 0o644))
	_, err := Load(filepath.Join(dir, "c.toml"))
	fs := faultsOf(t, err)
	var got []string
	for _, f := range fs {
		got = append(got, filepath.Base(f.File)+":"+f.Key)
	}
	assert.Equal(t, []string{"4.toml:", "5.toml:", "c.toml:sizing.max_vcpus", "c.toml:sizing.foo", "c.toml:log.level",
		"1.toml:", "2.toml:timeouts.boot", "3d.toml:hypervisor.accel"}, got)
	assert.Len(t, strings.Split(err.Error(), "\n"), len(fs)+1)
	assert.Contains(t, err.Error(), "configuration: 8 faults:")
}

func TestFileFaults(t *testing.T) {
	dir := write(t, map[string]string{"big.toml": "# " + strings.Repeat("x", maxFileBytes)})
	for _, tc := range []struct{ path, reason string }{
		{filepath.Join(dir, "missing.toml"), "no such file"},
		{dir, "regular file"},
		{filepath.Join(dir, "big.toml"), "larger than"},
	} {
		_, err := Load(tc.path)
		fs := faultsOf(t, err)
		require.Len(t, fs, 1)
		assert.Equal(t, tc.path, fs[0].File)
		assert.Contains(t, fs[0].Reason, tc.reason)
	}
	many := map[string]string{}
	for i := range maxDropIns + 1 {
		many[filepath.Join("config.d", string(rune('a'+i/26))+string(rune('a'+i%26))+".toml")] = ""
	}
	many["c.toml"] = ""
	_, err := Load(filepath.Join(write(t, many), "c.toml"))
	assert.Contains(t, faultsOf(t, err)[0].Reason, "65 drop-ins")
}

func TestCheckFile(t *testing.T) {
	dir := write(t, map[string]string{"kernel": "k", "empty": ""})
	c, err := Load(filepath.Join(write(t, map[string]string{"c.toml": "[hypervisor]\nkernel = '" + filepath.Join(dir, "nothere") + "'"}),
		"c.toml"))
	require.NoError(t, err)
	check := func(name string) Faults {
		return c.CheckFile("hypervisor.kernel", filepath.Join(dir, name), "build it")
	}
	require.Empty(t, check("kernel"))
	fs := check("nothere")
	require.Len(t, fs, 1)
	assert.Equal(t, "hypervisor.kernel", fs[0].Key)
	assert.Equal(t, 2, fs[0].Line)
	assert.Equal(t, filepath.Join(dir, "nothere")+": no such file or directory", fs[0].Reason)
	assert.Equal(t, "build it", fs[0].Fix)
	assert.Contains(t, check("empty")[0].Reason, "is empty")
	assert.Contains(t, check(".")[0].Reason, "not a regular file")
}

func TestBinariesAreFound(t *testing.T) {
	dir := write(t, map[string]string{"virtiofsd": ""})
	c, err := load("", filepath.Join(dir, "none"), nil)
	require.NoError(t, err)
	t.Setenv("PATH", dir)
	require.NoError(t, os.Chmod(filepath.Join(dir, "virtiofsd"), 0o755))
	got, err := c.VirtiofsdPath()
	require.NoError(t, err)
	assert.Equal(t, filepath.Join(dir, "virtiofsd"), got)
	_, err = c.binary("hypervisor.path", "", "no-such-vmm", []string{dir}, "install it")
	assert.Contains(t, faultsOf(t, err)[0].Reason, "no-such-vmm was not found in PATH, "+dir)
}

func TestFaultsError(t *testing.T) {
	assert.NoError(t, Faults(nil).err())
	err := Faults{{File: "f", Line: 3, Key: "a.b", Reason: "is bad", Fix: "mend it"}}.err()
	assert.EqualError(t, err, "configuration: f:3: a.b: is bad; mend it")
	assert.True(t, errors.Is(err, errdefs.ErrInvalidArgument))
}

// The snippets are what users copy: they must at least be what they claim to be.
func TestSnippets(t *testing.T) {
	data, err := os.ReadFile("containerd-config.toml")
	require.NoError(t, err)
	var conf struct {
		Version int `toml:"version"`
		Plugins map[string]struct {
			Containerd struct {
				Runtimes map[string]struct {
					Type      string `toml:"runtime_type"`
					Sandboxer string `toml:"sandboxer"`
				} `toml:"runtimes"`
			} `toml:"containerd"`
		} `toml:"plugins"`
	}
	require.NoError(t, toml.Unmarshal(data, &conf))
	runtimes := conf.Plugins["io.containerd.cri.v1.runtime"].Containerd.Runtimes
	for handler, sandboxer := range map[string]string{"cloister": "shim", "cloister-classic": "podsandbox"} {
		assert.Equal(t, "io.containerd.cloister.v2", runtimes[handler].Type)
		assert.Equal(t, sandboxer, runtimes[handler].Sandboxer)
	}
	data, err = os.ReadFile("runtimeclass.yaml")
	require.NoError(t, err)
	assert.Contains(t, string(data), "\nkind: RuntimeClass\n")
	assert.Contains(t, string(data), "\nhandler: cloister\n")
}

func FuzzMerge(f *testing.F) {
	f.Add(base)
	f.Add([]byte("[sizing]\nmax_vcpus = 1\n[[a.b]]\nc = {d = [1, {e = 2}]}\n"))
	f.Add([]byte("\"a.b\".c = 1\n[x.'y'.z]\n"))
	f.Add([]byte("a = 1\r\n# c\nb = '''\n'''"))
	f.Fuzz(func(t *testing.T, data []byte) {
		c := &Config{origins: map[string]origin{}}
		table := map[string]setting{}
		for _, s := range settings() {
			table[s.key] = s
		}
		for _, fault := range c.merge(table, layer{"f", data}) {
			if fault.Reason == "" || fault.File == "" {
				t.Fatalf("empty fault %+v", fault)
			}
		}
	})
}
