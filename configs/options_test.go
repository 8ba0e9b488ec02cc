// SPDX-License-Identifier: Apache-2.0

package configs

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	runcoptions "github.com/containerd/containerd/api/types/runc/options"
	runtimeoptions "github.com/containerd/containerd/api/types/runtimeoptions/v1"
	"github.com/containerd/typeurl/v2"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
)

func TestFromOptions(t *testing.T) {
	dir := write(t, map[string]string{
		"node/cloister.toml":     "log.level = 'warn'\nsizing.default_vcpus = 2",
		"other/c.toml":           "log.level = 'debug'",
		"other/config.d/1.toml":  "sizing.default_vcpus = 3",
		"broken/c.toml":          "log.level = 'loud'",
		"other/ignored/any.toml": "nonsense",
	})
	node := filepath.Join(dir, "node/cloister.toml")
	pack := func(o proto.Message) *anypb.Any {
		a, err := typeurl.MarshalAnyToProto(o)
		require.NoError(t, err)
		return a
	}
	for _, tc := range []struct {
		name    string
		options *anypb.Any
		level   string
		vcpus   int
	}{
		{"nil", nil, "warn", 2},
		{"no type", &anypb.Any{}, "warn", 2},
		{"empty", pack(&runtimeoptions.Options{}), "warn", 2},
		{"path with its drop-ins", pack(&runtimeoptions.Options{ConfigPath: filepath.Join(dir, "other/c.toml")}), "debug", 3},
		{"path beats body", pack(&runtimeoptions.Options{ConfigPath: filepath.Join(dir, "other/c.toml"),
			ConfigBody: []byte("log.level='error'")}), "debug", 3},
		{"body over node", pack(&runtimeoptions.Options{ConfigBody: []byte("log.level='error'")}), "error", 2},
		{"body with containerd's keys", pack(&runtimeoptions.Options{ConfigBody: []byte("TypeUrl='x'\nConfigPath=''\nsizing.default_vcpus=7")}),
			"warn", 7},
		{"runc's options", pack(&runcoptions.Options{Root: "/x", NoPivotRoot: true}), "warn", 2},
		{"google's type URL", &anypb.Any{TypeUrl: "type.googleapis.com/runtimeoptions.v1.Options"}, "warn", 2},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c, err := fromOptions(tc.options, "", node)
			require.NoError(t, err)
			assert.Equal(t, tc.level, c.Log.Level)
			assert.Equal(t, tc.vcpus, c.Sizing.DefaultVCPUs)
		})
	}
	for _, tc := range []struct {
		name        string
		options     *anypb.Any
		file, fault string
	}{
		{"unknown options", &anypb.Any{TypeUrl: "other.v1.Options"}, optionsFile, "other.v1.Options"},
		{"another runtime of runc's", pack(&runcoptions.Options{BinaryName: "crun"}), optionsFile, `asks for the program "crun"`},
		{"runc's garbage", &anypb.Any{TypeUrl: "containerd.runc.v1.Options", Value: []byte{0xff, 0xff}}, optionsFile, "decoded"},
		{"garbage", &anypb.Any{TypeUrl: "runtimeoptions.v1.Options", Value: []byte{0xff, 0xff}}, optionsFile, "decoded"},
		{"relative path", pack(&runtimeoptions.Options{ConfigPath: "c.toml"}), optionsFile, "absolute"},
		{"missing file", pack(&runtimeoptions.Options{ConfigPath: filepath.Join(dir, "gone")}), filepath.Join(dir, "gone"), "no such file"},
		{"bad file", pack(&runtimeoptions.Options{ConfigPath: filepath.Join(dir, "broken/c.toml")}), filepath.Join(dir, "broken/c.toml"), "loud"},
		{"bad body", pack(&runtimeoptions.Options{ConfigBody: []byte("[")}), optionsFile, "not TOML"},
		{"unknown key in body", pack(&runtimeoptions.Options{ConfigBody: []byte("BinaryName='/usr/bin/runc'")}), optionsFile, "not a key"},
		{"huge body", pack(&runtimeoptions.Options{ConfigBody: []byte("#" + strings.Repeat("x", maxFileBytes))}), optionsFile, "larger"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, err := fromOptions(tc.options, "", node)
			fs := faultsOf(t, err)
			require.Len(t, fs, 1, "%v", err)
			assert.Equal(t, tc.file, fs[0].File)
			assert.Contains(t, fs[0].Reason, tc.fault)
		})
	}
}

func TestApplyAnnotations(t *testing.T) {
	conf := func(toml string) *Config {
		c, err := load(filepath.Join(write(t, map[string]string{"c.toml": toml}), "c.toml"), "", nil)
		require.NoError(t, err)
		return c
	}
	pod := map[string]string{
		"io.cloister.sizing.vcpus":             "4",
		"io.cloister.sizing.memory-mib":        "1024",
		"io.cloister.hypervisor.kernel-params": "quiet  loglevel=3",
		"io.cloister.timeouts.boot":            "7s",
		"io.cloister.hypervisor.kernel":        "/evil",
		"other":                                "x",
	}

	none := conf("")
	got, err := none.ApplyAnnotations(pod)
	require.NoError(t, err)
	assert.Equal(t, none, got, "nothing is listed: nothing changes")
	assert.Equal(t, []string{"io.cloister.hypervisor.kernel", "io.cloister.hypervisor.kernel-params",
		"io.cloister.sizing.memory-mib", "io.cloister.sizing.vcpus", "io.cloister.timeouts.boot"}, none.IgnoredAnnotations(pod))

	some := conf("hypervisor.kernel_params = ['a']\nannotations.allowed = ['io.cloister.sizing.vcpus', " +
		"'io.cloister.hypervisor.kernel-params', 'io.cloister.timeouts.boot']")
	got, err = some.ApplyAnnotations(pod)
	require.NoError(t, err)
	assert.Equal(t, 4, got.Sizing.DefaultVCPUs)
	assert.Equal(t, 2048, got.Sizing.DefaultMemoryMiB)
	assert.Equal(t, []string{"a", "quiet", "loglevel=3"}, got.Hypervisor.KernelParams)
	assert.Equal(t, 7*time.Second, got.Timeouts.Boot)
	assert.Equal(t, none.Hypervisor.Kernel, got.Hypervisor.Kernel)
	assert.Equal(t, []string{"a"}, some.Hypervisor.KernelParams, "the receiver is immutable")
	assert.Equal(t, 1, some.Sizing.DefaultVCPUs)
	assert.Equal(t, []string{"io.cloister.hypervisor.kernel", "io.cloister.sizing.memory-mib"}, some.IgnoredAnnotations(pod))

	all := conf("sizing.max_vcpus = 4\nannotations.allowed = ['" + strings.Join(AnnotationKeys(), "', '") + "']")
	for _, tc := range []struct{ key, value, reason string }{
		{"io.cloister.sizing.vcpus", "many", "not a whole number"},
		{"io.cloister.sizing.vcpus", "0", "out of range"},
		{"io.cloister.sizing.vcpus", "5", "more than sizing.max_vcpus = 4"},
		{"io.cloister.sizing.memory-mib", "99999999999999999999", "not a whole number"},
		{"io.cloister.hypervisor.kernel-params", "a rdinit=/bin/sh", "set by Cloister"},
		{"io.cloister.hypervisor.kernel-params", strings.Repeat("x", 5000), "5000 bytes"},
		{"io.cloister.timeouts.boot", "1", "not a duration"},
	} {
		t.Run(tc.key, func(t *testing.T) {
			_, err := all.ApplyAnnotations(map[string]string{tc.key: tc.value})
			fs := faultsOf(t, err)
			require.Len(t, fs, 1)
			assert.Equal(t, annotationsFile, fs[0].File)
			assert.Contains(t, fs[0].Reason, tc.reason)
		})
	}
	_, err = all.ApplyAnnotations(map[string]string{"io.cloister.sizing.vcpus": "x", "io.cloister.sizing.memory-mib": "y"})
	assert.Len(t, faultsOf(t, err), 2)
}

// Design rule 2: no annotation names a file or a command.
func TestAnnotationsNameNoFiles(t *testing.T) {
	for name, a := range annotationTable() {
		for _, word := range []string{"path", "dir", "kernel", "initrd", "virtiofsd", "hypervisor.path"} {
			if strings.HasSuffix(a.key, "."+word) || strings.HasSuffix(a.key, "_"+word) {
				t.Errorf("%s changes %s", name, a.key)
			}
		}
	}
}

func TestPathVariableStandsForTheDefaultFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "node.toml")
	require.NoError(t, os.WriteFile(path, []byte("[sizing]\ndefault_vcpus = 3\n"), 0o600))
	t.Setenv(PathVariable, path)
	for _, load := range []func() (*Config, error){
		func() (*Config, error) { return Load("") },
		func() (*Config, error) { return FromOptions(nil) },
	} {
		c, err := load()
		require.NoError(t, err)
		require.Equal(t, 3, c.Sizing.DefaultVCPUs)
	}
	t.Setenv(PathVariable, path+".missing")
	_, err := Load("")
	require.ErrorContains(t, err, "node.toml.missing")
}

func TestRuncOptions(t *testing.T) {
	packed, err := typeurl.MarshalAnyToProto(&runcoptions.Options{Root: "/x", NoPivotRoot: true, IoUid: 7})
	require.NoError(t, err)
	ignored, runc, err := RuncOptions(packed)
	require.NoError(t, err)
	require.True(t, runc)
	require.Equal(t, []string{"io_uid", "no_pivot_root", "root"}, ignored)
	_, runc, err = RuncOptions(&anypb.Any{TypeUrl: "containerd.runc.v1.Options"})
	require.NoError(t, err)
	require.True(t, runc)
	for _, none := range []*anypb.Any{nil, {}, {TypeUrl: "runtimeoptions.v1.Options", Value: []byte{1}}} {
		ignored, runc, err := RuncOptions(none)
		require.NoError(t, err)
		require.False(t, runc)
		require.Empty(t, ignored)
	}
}
