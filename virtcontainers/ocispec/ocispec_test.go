// SPDX-License-Identifier: Apache-2.0

package ocispec

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"github.com/stretchr/testify/require"

	"github.com/cloister-project/cloister/agent-protocol/wire"
	"github.com/cloister-project/cloister/virtcontainers/refusal"
)

func TestContainerKeepsTheHostOut(t *testing.T) {
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
	plan, err := Container(spec, false)
	require.NoError(t, err)
	for _, word := range []string{"/run/containerd", "secret", "/proc/7", "kubepods", "apparmor", "/bin/true", "/srv/data", "0-63"} {
		require.NotContains(t, string(plan), word)
	}
	var got specs.Spec
	require.NoError(t, json.Unmarshal(plan, &got))
	require.True(t, got.Root.Readonly)
	require.True(t, got.Process.NoNewPrivileges)
	require.Equal(t, specs.ActErrno, got.Linux.Seccomp.DefaultAction)
	require.Equal(t, []specs.LinuxNamespace{{Type: specs.PIDNamespace}, {Type: specs.IPCNamespace, Path: "pod"}}, got.Linux.Namespaces)
	require.Equal(t, "0-63", spec.Linux.Resources.CPU.Cpus, "the caller's specification must not change")
}

func TestContainerIsRefused(t *testing.T) {
	devices := func(paths ...string) *specs.Linux {
		l := &specs.Linux{}
		for _, p := range paths {
			l.Devices = append(l.Devices, specs.LinuxDevice{Path: p})
		}
		return l
	}
	for _, tc := range []struct {
		name    string
		spec    *specs.Spec
		refused bool
		want    []string
	}{
		{"none", nil, false, []string{"no process"}},
		{"no process", &specs.Spec{}, false, []string{"no process"}},
		{"devices", &specs.Spec{Process: &specs.Process{}, Linux: devices("/dev/sda", "/dev/null", "/dev/kvm")}, true,
			[]string{"host devices /dev/sda, /dev/kvm: ", "privileged_without_host_devices"}},
		{"many devices", &specs.Spec{Process: &specs.Process{}, Linux: devices(strings.Fields(strings.Repeat("/dev/x ", 10))...)}, true,
			[]string{"/dev/x and 2 more"}},
		{"block device", &specs.Spec{Process: &specs.Process{}, Linux: &specs.Linux{
			Devices: []specs.LinuxDevice{{Path: "/dev/xvda", Type: "b"}}}}, true,
			[]string{"not in a VM: volumeDevices /dev/xvda: use volumeMode: Filesystem"}},
		{"sysctl", &specs.Spec{Process: &specs.Process{}, Linux: &specs.Linux{Sysctl: map[string]string{"kernel.panic": "1", "kernel.sem": "1"}}},
			true, []string{"not in a VM: sysctl kernel.panic: "}},
		{"huge", &specs.Spec{Process: &specs.Process{Env: []string{strings.Repeat("x", wire.MaxSpec)}}}, false, []string{"environment"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, err := Container(tc.spec, false)
			require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
			for _, w := range tc.want {
				require.ErrorContains(t, err, w)
			}
			reasons, other := refusal.Reasons(err)
			require.Equal(t, tc.refused, other == nil)
			if tc.refused {
				require.Len(t, reasons, 1)
			}
		})
	}
}

// Of the standard devices the guest makes all but one unasked.
func TestContainerAsksForFuse(t *testing.T) {
	b, err := Container(&specs.Spec{Process: &specs.Process{}, Linux: &specs.Linux{Devices: []specs.LinuxDevice{
		{Path: "/dev/null"}, {Path: "/dev/fuse", Type: "c", Major: 10, Minor: 229}, {Path: "/dev//tty"},
	}}}, false)
	require.NoError(t, err)
	var got specs.Spec
	require.NoError(t, json.Unmarshal(b, &got))
	require.Equal(t, []specs.LinuxDevice{{Path: "/dev/fuse", Type: "c", Major: 10, Minor: 229}}, got.Linux.Devices)
}

func TestProcessAndResources(t *testing.T) {
	b, err := Process(&specs.Process{Args: []string{"sh"}, ApparmorProfile: "of-the-host", SelinuxLabel: "of-the-host"})
	require.NoError(t, err)
	require.NotContains(t, string(b), "of-the-host")
	b, err = Process(nil)
	require.NoError(t, err)
	require.Equal(t, "null", string(b))
	r := &specs.LinuxResources{CPU: &specs.LinuxCPU{Cpus: "0-63"}, BlockIO: &specs.LinuxBlockIO{}}
	b, err = Resources(r)
	require.NoError(t, err)
	require.JSONEq(t, `{"cpu": {}}`, string(b))
	require.Equal(t, "0-63", r.CPU.Cpus, "the caller's limits must not change")
}

func TestSysctlsOfAContainer(t *testing.T) {
	asked := map[string]string{"net.core.somaxconn": "77", "kernel.shmmni": "77"}
	spec := &specs.Spec{Process: &specs.Process{}, Linux: &specs.Linux{Sysctl: asked}}
	for alone, want := range map[bool]map[string]string{true: {"kernel.shmmni": "77"}, false: asked} {
		b, err := Container(spec, alone)
		require.NoError(t, err)
		var got specs.Spec
		require.NoError(t, json.Unmarshal(b, &got))
		require.Equal(t, want, got.Linux.Sysctl)
	}
	require.Len(t, asked, 2, "the caller's own stays as it is")
}
