// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cloister-project/cloister/test/harness"
)

// A pod on a node that is not in order fails with an error that names the key and what to do, before a guest boots.
func TestFaultsOfTheNode(t *testing.T) {
	n := sharedNode(t)
	dir := t.TempDir()
	text := filepath.Join(dir, "text")
	require.NoError(t, os.WriteFile(text, []byte("this is neither a kernel nor a program\n"), 0o755))

	for _, c := range []struct {
		name, settings string
		want           []string
	}{
		{
			name: "kernel is missing", settings: "hypervisor.kernel = '/nowhere/vmlinuz'",
			want: []string{"hypervisor.kernel", "/nowhere/vmlinuz", "no such file", "make guest", "60-fault.toml"},
		},
		{
			name: "kernel is a text", settings: fmt.Sprintf("hypervisor.kernel = %q", text),
			want: []string{text, "kernel"},
		},
		{
			name: "initrd is missing", settings: "hypervisor.initrd = '/nowhere/initrd'",
			want: []string{"hypervisor.initrd", "/nowhere/initrd", "no such file", "make guest"},
		},
		{
			name: "everything is missing", settings: "hypervisor.kernel = '/nowhere/k'\nhypervisor.initrd = '/nowhere/i'\nhypervisor.path = " +
				"'/nowhere/q'",
			want: []string{"hypervisor.kernel", "hypervisor.initrd", "hypervisor.path", "make guest", "qemu-system-x86"},
		},
		{
			name: "QEMU is missing", settings: "hypervisor.path = '/nowhere/qemu'",
			want: []string{"hypervisor.path", "/nowhere/qemu", "no such file", "install QEMU"},
		},
		{
			name: "QEMU is another program", settings: "hypervisor.path = '/bin/true'",
			want: []string{"/bin/true", "QEMU", "hypervisor.path"},
		},
		{
			name: "QEMU is a text", settings: fmt.Sprintf("hypervisor.path = %q", text),
			want: []string{text, "QEMU", "hypervisor.path"},
		},
		{
			name:     "unknown keys and bad values, all at once",
			settings: "hypervisor.kernle = 'x'\nsizing.default_vcpus = -1\ntimeouts.boot = 'soon'\nnonsense = 1",
			want:     []string{"60-fault.toml", "hypervisor.kernle", "sizing.default_vcpus", "timeouts.boot", "soon", "nonsense"},
		},
		{
			name: "not TOML", settings: "[hypervisor",
			want: []string{"60-fault.toml:1", "not TOML"},
		},
		{
			name: "layer cache is a file", settings: fmt.Sprintf("rootfs.cache_dir = %q", text),
			want: []string{text, "rootfs.cache_dir", "not a directory"},
		},
		{
			name: "state directory is below a file", settings: fmt.Sprintf("state.dir = %q", filepath.Join(n.CloisterConfig, "x")),
			want: []string{"state.dir", "not a directory"},
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			withSettings(t, n, c.settings)
			requireNoPod(t, n, harness.PodSpec{}, c.want...)
		})
	}

	t.Run("more memory than the host has", func(t *testing.T) {
		requireNoPod(t, n, harness.PodSpec{Change: func(c *runtimeapi.PodSandboxConfig) {
			c.Linux.Resources = &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: 1 << 50}
		}}, "memory", "MiB", "host")
	})
	t.Run("layer cache cannot be written", func(t *testing.T) {
		cache, unmount := mountTmpfs(t, n, "ro", "size=1m")
		require.NoError(t, unix.Mount("", cache, "", unix.MS_REMOUNT|unix.MS_RDONLY, ""))
		withSettings(t, n, fmt.Sprintf("rootfs.cache_dir = %q", cache))
		pod, err := n.CRI().RunPod(testContext(t), harness.PodSpec{Handler: harness.HandlerCloister})
		if err == nil {
			require.NoError(t, pod.Remove(testContext(t)))
		}
		require.Error(t, err)
		requireContains(t, err.Error(), cache, "rootfs.cache_dir", "read-only")
		unmount()
		requireNothingLeft(t, n)
	})
	t.Run("disk of the state directory is full", func(t *testing.T) {
		state, unmount := mountTmpfs(t, n, "full", "size=4k,nr_inodes=2")
		withSettings(t, n, fmt.Sprintf("state.dir = %q", state))
		pod, err := n.CRI().RunPod(testContext(t), harness.PodSpec{Handler: harness.HandlerCloister})
		if err == nil {
			require.NoError(t, pod.Remove(testContext(t)))
		}
		require.Error(t, err)
		requireContains(t, err.Error(), state, "state.dir", "no space left")
		unmount()
		requireNothingLeft(t, n)
	})
	t.Run("network of the host", func(t *testing.T) {
		requireNoPod(t, n, harness.PodSpec{Change: func(c *runtimeapi.PodSandboxConfig) {
			c.Linux.SecurityContext.NamespaceOptions.Network = runtimeapi.NamespaceMode_NODE
		}}, "hostNetwork: leave it out or use another runtime class")
	})
}
