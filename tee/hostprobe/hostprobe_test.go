// SPDX-License-Identifier: Apache-2.0

package hostprobe

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
)

// tree makes a host of files: path to content.
func tree(t *testing.T, files map[string]string) Host {
	t.Helper()
	root := t.TempDir()
	for path, content := range files {
		path = filepath.Join(root, path)
		require.NoError(t, os.MkdirAll(filepath.Dir(path), 0o755))
		require.NoError(t, os.WriteFile(path, []byte(content), 0o644))
	}
	return Host{Root: root}
}

func TestDescribeVMTypes(t *testing.T) {
	require.Equal(t, "{}", DescribeVMTypes(0))
	require.Equal(t, "{default}", DescribeVMTypes(1))
	require.Equal(t, "{default, software-protected, SEV, SEV-ES, SEV-SNP}", DescribeVMTypes(0x1f))
	require.Equal(t, "{default, TDX, type 6, type 30}", DescribeVMTypes(1|1<<VMTypeTDX|1<<6|1<<30))
}

func TestKVMExtension(t *testing.T) {
	h := tree(t, nil)
	_, err := h.KVMExtension(CapVMTypes)
	require.ErrorIs(t, err, errdefs.ErrUnavailable)
	require.ErrorContains(t, err, "firmware")

	h = tree(t, map[string]string{"dev/kvm": ""})
	_, err = h.KVMExtension(CapVMTypes)
	require.ErrorIs(t, err, errdefs.ErrUnavailable)
	require.ErrorContains(t, err, "KVM_CHECK_EXTENSION 235")

	h.Extension = func(capability int) (int, error) { return capability + 1, nil }
	v, err := h.KVMExtension(CapVMTypes)
	require.NoError(t, err)
	require.Equal(t, 236, v)

	h.Extension = func(int) (int, error) { return 0, nil }
	v, err = h.VMTypes()
	require.NoError(t, err)
	require.Equal(t, 1<<VMTypeDefault, v, "a kernel before 6.7 has the default type")
	broken := errors.New("broken")
	h.Extension = func(int) (int, error) { return 0, broken }
	_, err = h.VMTypes()
	require.ErrorIs(t, err, broken)
}

func TestKVMExtensionOfThisMachine(t *testing.T) {
	h := Host{}
	if err := h.CanOpen("/dev/kvm"); err != nil {
		t.Skip(err)
	}
	v, err := h.VMTypes()
	require.NoError(t, err)
	require.NotZero(t, v&(1<<VMTypeDefault), "every KVM has the default type, this one %s", DescribeVMTypes(v))
	v, err = h.KVMExtension(0) // KVM_CAP_IRQCHIP
	require.NoError(t, err)
	require.NotZero(t, v)
}

func TestModuleParameter(t *testing.T) {
	h := tree(t, map[string]string{
		"sys/module/kvm_intel/parameters/tdx": "Y\n",
		"sys/module/big/parameters/big":       strings.Repeat("x", maxFile+1),
		"sys/module/file":                     "",
	})
	v, ok, err := h.ModuleParameter("kvm_intel", "tdx")
	require.NoError(t, err)
	require.True(t, ok)
	require.Equal(t, "Y", v)
	for _, module := range []string{"kvm_amd", "file"} {
		_, ok, err = h.ModuleParameter(module, "sev_snp")
		require.NoError(t, err)
		require.False(t, ok)
	}
	_, _, err = h.ModuleParameter("big", "big")
	require.ErrorIs(t, err, errdefs.ErrOutOfRange)
	require.True(t, h.ModuleLoaded("kvm_intel"))
	require.False(t, h.ModuleLoaded("file"))
	require.False(t, h.ModuleLoaded("kvm_amd"))
}

func TestMisc(t *testing.T) {
	tests := map[string]struct {
		files             map[string]string
		capacity, current uint64
		ok                bool
	}{
		"nothing": {files: map[string]string{"sys/fs/cgroup/memory/tasks": ""}},
		"v2": {
			files:    map[string]string{"sys/fs/cgroup/misc.capacity": "sev 410\nsev_es 99\n", "sys/fs/cgroup/misc.current": "sev 4\nsev_es 3\n"},
			capacity: 99, current: 3, ok: true,
		},
		"v2 whose root counts nothing": {
			files: map[string]string{
				"sys/fs/cgroup/misc.capacity":             "sev_es 99\n",
				"sys/fs/cgroup/a.slice/misc.current":      "sev 1\nsev_es 5\n",
				"sys/fs/cgroup/a.slice/deep/misc.current": "sev_es 5\n",
				"sys/fs/cgroup/b.slice/misc.current":      "sev_es 2\n",
				"sys/fs/cgroup/c.slice/other":             "sev_es 2\n",
			},
			capacity: 99, current: 7, ok: true,
		},
		"v2 beside v1": {
			files:    map[string]string{"sys/fs/cgroup/unified/misc.capacity": "sev_es 9", "sys/fs/cgroup/unified/misc.current": "sev_es 0"},
			capacity: 9, ok: true,
		},
		"v1": {
			files:    map[string]string{"sys/fs/cgroup/misc/misc.capacity": "sev_es 9", "sys/fs/cgroup/misc/misc.current": "sev_es 1"},
			capacity: 9, current: 1, ok: true,
		},
		"another resource": {files: map[string]string{"sys/fs/cgroup/misc.capacity": "sev 410\n"}},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			capacity, current, ok, err := tree(t, tt.files).Misc("sev_es")
			require.NoError(t, err)
			require.Equal(t, tt.ok, ok)
			require.Equal(t, tt.capacity, capacity)
			require.Equal(t, tt.current, current)
		})
	}
	for _, file := range []string{"misc.capacity", "misc.current"} {
		files := map[string]string{"sys/fs/cgroup/misc.capacity": "sev_es 9"}
		files["sys/fs/cgroup/"+file] = "sev_es many"
		_, _, _, err := tree(t, files).Misc("sev_es")
		require.ErrorContains(t, err, "many")
	}
}

func TestCPUInfo(t *testing.T) {
	x86 := tree(t, map[string]string{"proc/cpuinfo": "processor\t: 0\nvendor_id\t: GenuineIntel\nflags\t\t: fpu vmx " +
		"tdx_host_platform\n\nprocessor\t: 1\nflags\t\t: fpu\n"})
	vendor, err := x86.CPUVendor()
	require.NoError(t, err)
	require.Equal(t, "GenuineIntel", vendor)
	flags, err := x86.CPUFlags()
	require.NoError(t, err)
	require.Equal(t, []string{"fpu", "vmx", "tdx_host_platform"}, flags)
	facilities, err := x86.Facilities()
	require.NoError(t, err)
	require.Empty(t, facilities)

	z := tree(t, map[string]string{"proc/cpuinfo": "vendor_id       : IBM/S390\nfeatures\t: esan3 sie\nfacilities      : 0 1 2 158 161\n"})
	flags, err = z.CPUFlags()
	require.NoError(t, err)
	require.Equal(t, []string{"esan3", "sie"}, flags)
	facilities, err = z.Facilities()
	require.NoError(t, err)
	require.Equal(t, []int{0, 1, 2, 158, 161}, facilities)

	_, err = tree(t, map[string]string{"proc/cpuinfo": "facilities : 1 x\n"}).Facilities()
	require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
	_, err = tree(t, nil).CPUFlags()
	require.ErrorIs(t, err, os.ErrNotExist)
}

func TestCPUIDAgreesWithTheKernel(t *testing.T) {
	if runtime.GOARCH != "amd64" {
		_, ok := SEV()
		require.False(t, ok, "only AMD CPUs have SEV")
		t.Skip("CPUID is x86's")
	}
	flags, err := Host{}.CPUFlags()
	require.NoError(t, err)
	info, ok := SEV()
	require.Equal(t, ok, info.SEV || info.CBitPosition != 0)
	for flag, has := range map[string]bool{"sev": info.SEV, "sev_es": info.ES, "sev_snp": info.SNP} {
		for _, f := range flags {
			if f == flag {
				// The kernel clears flags of what the firmware left switched off, so they imply one way only.
				require.True(t, has, flag)
			}
		}
	}
}

func TestCanOpen(t *testing.T) {
	h := tree(t, map[string]string{"dev/sev": "", "dev/directory/x": ""})
	require.NoError(t, h.CanOpen("/dev/sev"))
	require.ErrorIs(t, h.CanOpen("/dev/none"), errdefs.ErrNotFound)
	require.EqualError(t, h.CanOpen("/dev/none"), "/dev/none is not there")
	require.ErrorIs(t, h.CanOpen("/dev/sev/none"), errdefs.ErrNotFound)
	require.ErrorIs(t, h.CanOpen("/dev/directory"), errdefs.ErrUnavailable)
	if os.Getuid() != 0 {
		require.NoError(t, os.Chmod(filepath.Join(h.Root, "dev/sev"), 0))
		require.ErrorIs(t, h.CanOpen("/dev/sev"), errdefs.ErrPermissionDenied)
		require.EqualError(t, h.CanOpen("/dev/sev"), "this user must not open /dev/sev")
	}
}

func TestCanConnect(t *testing.T) {
	h := tree(t, map[string]string{"file": ""})
	l, err := net.Listen("unix", filepath.Join(h.Root, "sock"))
	require.NoError(t, err)
	defer l.Close()
	require.NoError(t, h.CanConnect("/sock"))
	require.ErrorIs(t, h.CanConnect("/file"), errdefs.ErrUnavailable)
	require.ErrorIs(t, h.CanConnect("/none"), errdefs.ErrNotFound)
}
