// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"context"
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"

	"github.com/cloister-project/cloister/hypervisor"
	"github.com/cloister-project/cloister/hypervisor/hostcheck"
)

func TestProbeAndCache(t *testing.T) {
	path, err := findBinary(os.Getenv("CLOISTER_TEST_QEMU"), hypervisor.ArchAMD64)
	if err != nil {
		t.Skip(err)
	}
	dir := filepath.Join(t.TempDir(), "cache")
	d := New(Config{Path: path, CacheDir: dir, Arch: hypervisor.ArchAMD64})
	t.Logf("%+v", features(t, d))
	require.NoError(t, features(t, d).lacks(goldenDocument(), false))
	require.NotEmpty(t, features(t, d).Version)

	files, err := filepath.Glob(filepath.Join(dir, "*"))
	require.NoError(t, err)
	require.Len(t, files, 1)
	// The second time it comes from the cache: a mark in it is seen.
	id, err := identifyBinary(path)
	require.NoError(t, err)
	require.NoError(t, writeFeatures(files[0], cachedFeatures{Version: featuresVersion, Binary: id,
		Features: Features{Version: "mark", Architecture: hypervisor.ArchAMD64}}))
	d = New(Config{Path: path, CacheDir: dir, Arch: hypervisor.ArchAMD64})
	require.Equal(t, "mark", features(t, d).Version)

	// Another binary at the same path, rubbish, and another format are not believed.
	other := id
	other.Mtime++
	require.NoError(t, writeFeatures(files[0], cachedFeatures{Version: featuresVersion, Binary: other}))
	_, ok := readFeatures(files[0], id)
	require.False(t, ok)
	require.NoError(t, writeFeatures(files[0], cachedFeatures{Version: featuresVersion + 1, Binary: id}))
	_, ok = readFeatures(files[0], id)
	require.False(t, ok)
	require.NoError(t, os.WriteFile(files[0], []byte("{"), 0o600))
	d = New(Config{Path: path, CacheDir: dir, Arch: hypervisor.ArchAMD64})
	require.NotEqual(t, "mark", features(t, d).Version)
}

func TestAccelerator(t *testing.T) {
	dir := t.TempDir()
	file := func(name, content string) string {
		path := filepath.Join(dir, name)
		require.NoError(t, os.WriteFile(path, []byte(content), 0o600))
		return path
	}
	intel := file("intel", "processor\t: 0\nflags\t\t: fpu vme vmx sse\nvmx flags\t: x\n\nprocessor\t: 1\n")
	amd := file("amd", "processor\t: 0\nflags\t\t: fpu svm\n")
	s390 := file("s390", "vendor_id : IBM/S390\nfeatures\t: esan3 sie highgprs\n")
	none := file("none", "processor\t: 0\nflags\t\t: fpu vmxnet svme hypervisor\nvmx flags\t: x\n")
	kvm := file("kvm", "")
	absent := filepath.Join(dir, "absent")
	all := debianFeatures()
	onlyTCG, onlyKVM := Features{Types: []string{"tcg-accel"}}, Features{Types: []string{"kvm-accel"}}

	for _, tc := range []struct {
		name string
		host hostcheck.KVM
		f    Features
		want string
		got  hypervisor.Accelerator
		err  error
	}{
		{"auto, Intel", hostcheck.KVM{Device: kvm, CPUInfo: intel}, all, "auto", "kvm", nil},
		{"auto, AMD", hostcheck.KVM{Device: kvm, CPUInfo: amd}, all, "", "kvm", nil},
		{"auto, s390x", hostcheck.KVM{Device: kvm, CPUInfo: s390}, all, "auto", "kvm", nil},
		{"auto, software KVM", hostcheck.KVM{Device: kvm, CPUInfo: none}, all, "auto", "tcg", nil},
		{"auto, no device", hostcheck.KVM{Device: absent, CPUInfo: intel}, all, "auto", "tcg", nil},
		{"auto, binary without KVM", hostcheck.KVM{Device: kvm, CPUInfo: intel}, onlyTCG, "auto", "tcg", nil},
		{"auto, nothing at all", hostcheck.KVM{Device: absent, CPUInfo: intel}, onlyKVM, "auto", "", errdefs.ErrUnavailable},
		{"kvm", hostcheck.KVM{Device: kvm, CPUInfo: intel}, all, "kvm", "kvm", nil},
		{"kvm, no device", hostcheck.KVM{Device: absent, CPUInfo: intel}, all, "kvm", "", os.ErrNotExist},
		{"kvm, software KVM", hostcheck.KVM{Device: kvm, CPUInfo: none}, all, "kvm", "", errdefs.ErrUnavailable},
		{"kvm, binary without", hostcheck.KVM{Device: kvm, CPUInfo: intel}, onlyTCG, "kvm", "", errdefs.ErrNotImplemented},
		{"tcg", hostcheck.KVM{Device: kvm, CPUInfo: intel}, all, "tcg", "tcg", nil},
		{"tcg, binary without", hostcheck.KVM{Device: kvm, CPUInfo: intel}, onlyKVM, "tcg", "", errdefs.ErrNotImplemented},
		{"unknown", hostcheck.KVM{Device: kvm, CPUInfo: intel}, all, "xen", "", errdefs.ErrInvalidArgument},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got, err := accelerator(tc.want, tc.f, tc.host)
			require.Equal(t, tc.got, got)
			if tc.err == nil {
				require.NoError(t, err)
			} else {
				require.ErrorIs(t, err, tc.err)
			}
		})
	}
}

func TestNewForAnotherArchitecture(t *testing.T) {
	s390x := driverFor(t, hypervisor.ArchS390X)
	f := features(t, s390x)
	require.Equal(t, hypervisor.ArchS390X, f.Architecture)
	require.Contains(t, f.Machine, "s390-ccw-virtio-", "a concrete type")
	require.NotContains(t, f.Types, typeSE, "it is in builds for s390x hosts only")
	require.NoError(t, f.lacks(s390xDocument(), false))
	_, err := New(Config{Path: probed(t, s390x).path, Arch: hypervisor.ArchAMD64}).Capabilities(context.Background())
	require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
	require.ErrorContains(t, err, "is a QEMU for s390x guests and one for amd64 is needed")

	_, err = New(Config{Arch: "riscv64"}).Capabilities(context.Background())
	require.ErrorIs(t, err, errdefs.ErrNotImplemented)
	require.ErrorContains(t, err, "riscv64")
}
