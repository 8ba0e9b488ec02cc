// SPDX-License-Identifier: Apache-2.0

package virtcontainers

import (
	"encoding/json"
	"errors"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"github.com/stretchr/testify/require"

	"github.com/cloister-project/cloister/agent-protocol/wire"
)

func TestPlanContainerKeepsTheHostOut(t *testing.T) {
	spec := &specs.Spec{
		Version:     specs.Version,
		Hostname:    "h",
		Annotations: map[string]string{"secret": "of-the-host"},
		Root:        &specs.Root{Path: "/run/containerd/bundle/rootfs", Readonly: true},
		Process: &specs.Process{
			Args: []string{"sh"}, Cwd: "/", ApparmorProfile: "cri-containerd.apparmor.d", SelinuxLabel: "x",
			Capabilities: &specs.LinuxCapabilities{Bounding: []string{"CAP_KILL"}}, NoNewPrivileges: true,
		},
		Hooks: &specs.Hooks{Poststop: []specs.Hook{{Path: "/bin/true"}}},
		Linux: &specs.Linux{
			CgroupsPath: "/kubepods/x",
			Namespaces: []specs.LinuxNamespace{
				{Type: specs.NetworkNamespace, Path: "/proc/7/ns/net"},
				{Type: specs.PIDNamespace},
				{Type: specs.IPCNamespace, Path: "/proc/7/ns/ipc"},
			},
			Devices:   []specs.LinuxDevice{{Path: "/dev/null", Type: "c", Major: 1, Minor: 3}},
			Resources: &specs.LinuxResources{CPU: &specs.LinuxCPU{Cpus: "0-63", Mems: "1"}},
			Seccomp:   &specs.LinuxSeccomp{DefaultAction: specs.ActErrno},
		},
		Mounts: []specs.Mount{
			{Destination: "/proc", Type: "proc", Source: "proc"},
			{Destination: "/data", Type: "bind", Source: "/srv/data", Options: []string{"rbind", "rw"}},
		},
	}
	plan, err := planContainer(spec, PodConfig{}, "")
	require.NoError(t, err)
	require.Len(t, plan.mounts, 2)
	for _, word := range []string{"/run/containerd", "secret", "/proc/7", "kubepods", "apparmor", "/bin/true", "/srv/data", "0-63"} {
		require.NotContains(t, string(plan.spec), word)
	}
	var got specs.Spec
	require.NoError(t, json.Unmarshal(plan.spec, &got))
	require.True(t, got.Root.Readonly)
	require.True(t, got.Process.NoNewPrivileges)
	require.Equal(t, specs.ActErrno, got.Linux.Seccomp.DefaultAction)
	require.Equal(t, []specs.LinuxNamespace{{Type: specs.PIDNamespace}, {Type: specs.IPCNamespace, Path: "pod"}}, got.Linux.Namespaces)
	require.Equal(t, "0-63", spec.Linux.Resources.CPU.Cpus, "the caller's specification must not change")
}

func TestPlanContainerAddsThePodsFiles(t *testing.T) {
	shm := specs.Mount{Destination: "/dev/shm", Type: "tmpfs", Source: "shm", Options: []string{"size=65536k"}}
	own := specs.Mount{Destination: "/etc/hosts/", Type: "bind", Source: "/var/lib/kubelet/hosts", Options: []string{"rbind"}}
	for _, c := range []struct {
		name     string
		pod      PodConfig
		ipc      string
		readonly bool
		want     map[string]string // destination: type, source, last option
	}{
		{"containerd's sandboxer brings them", PodConfig{}, "/proc/7/ns/ipc", false,
			map[string]string{"/dev/shm": "tmpfs shm size=65536k", "/etc/hosts/": "bind /var/lib/kubelet/hosts rbind"}},
		{"ours", PodConfig{OwnFiles: true}, "/proc/7/ns/ipc", false,
			map[string]string{"/dev/shm": "bind  rw", "/etc/hosts/": "bind /var/lib/kubelet/hosts rbind", "/etc/hostname": "bind  rw", "/etc/resolv.conf": "bind  rw"}},
		{"read-only root", PodConfig{OwnFiles: true}, "/proc/7/ns/ipc", true,
			map[string]string{"/dev/shm": "bind  rw", "/etc/hosts/": "bind /var/lib/kubelet/hosts rbind", "/etc/hostname": "bind  ro", "/etc/resolv.conf": "bind  ro"}},
		{"private ipc", PodConfig{OwnFiles: true}, "", false,
			map[string]string{"/dev/shm": "tmpfs shm size=65536k", "/etc/hosts/": "bind /var/lib/kubelet/hosts rbind", "/etc/hostname": "bind  rw", "/etc/resolv.conf": "bind  rw"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			spec := &specs.Spec{
				Process: &specs.Process{}, Root: &specs.Root{Readonly: c.readonly}, Mounts: []specs.Mount{shm, own},
				Linux: &specs.Linux{Namespaces: []specs.LinuxNamespace{{Type: specs.IPCNamespace, Path: c.ipc}}},
			}
			plan, err := planContainer(spec, c.pod, "")
			require.NoError(t, err)
			got := map[string]string{}
			for _, m := range plan.mounts {
				got[m.Destination] = m.Type + " " + m.Source + " " + m.Options[len(m.Options)-1]
			}
			require.Equal(t, c.want, got)
			require.Equal(t, shm, spec.Mounts[0], "the caller's specification must not change")
		})
	}
}

func TestPlanContainerRefusesEverythingAtOnce(t *testing.T) {
	process := &specs.Process{Args: []string{"sh"}, Cwd: "/"}
	for _, tc := range []struct {
		name string
		spec *specs.Spec
		want []string
	}{
		{"no process", &specs.Spec{}, []string{"no process"}},
		{"devices and mounts", &specs.Spec{
			Process: process,
			Linux:   &specs.Linux{Devices: []specs.LinuxDevice{{Path: "/dev/sda"}, {Path: "/dev/kvm"}}},
			Mounts: []specs.Mount{
				{Destination: "/n", Type: "nfs", Source: "srv:/x"},
				{Destination: "/s", Type: "bind", Source: "/x", Options: []string{"rbind", "rshared"}},
				{Destination: "rel", Type: "tmpfs"},
				{Destination: "/r", Type: "bind", Source: "rel"},
			},
		}, []string{"/dev/sda, /dev/kvm", "privileged_without_host_devices", `"nfs"`, "Bidirectional", "destination is not an absolute", "source is not an absolute"}},
		{"huge", &specs.Spec{Process: &specs.Process{Env: []string{strings.Repeat("x", wire.MaxSpec)}}}, []string{"environment"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, err := planContainer(tc.spec, PodConfig{}, "")
			require.Error(t, err)
			require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
			for _, w := range tc.want {
				require.ErrorContains(t, err, w)
			}
			var refused *RefusedError
			if errors.As(err, &refused) {
				require.Len(t, refused.Reasons, 5)
			}
		})
	}
}
