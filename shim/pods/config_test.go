// SPDX-License-Identifier: Apache-2.0

package pods

import (
	"os"
	"path/filepath"
	"testing"

	runtimeoptions "github.com/containerd/containerd/api/types/runtimeoptions/v1"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/cloister-project/cloister/shim/criv1"
	vc "github.com/cloister-project/cloister/virtcontainers"
)

func request() Request { return Request{ID: "id", Namespace: "ns", Bundle: "/b"} }

func TestFromSpecNetwork(t *testing.T) {
	for name, tt := range map[string]struct {
		namespaces []specs.LinuxNamespace
		want       vc.NetworkMode
		path       string
	}{
		"new":  {[]specs.LinuxNamespace{{Type: specs.MountNamespace}, {Type: specs.NetworkNamespace}}, vc.NetworkNew, ""},
		"path": {[]specs.LinuxNamespace{{Type: specs.NetworkNamespace, Path: "/run/netns/x"}}, vc.NetworkPath, "/run/netns/x"},
		"host": {[]specs.LinuxNamespace{{Type: specs.MountNamespace}}, vc.NetworkHost, ""},
	} {
		t.Run(name, func(t *testing.T) {
			p, err := FromSpec(t.Context(), request(), ModeSingle, &specs.Spec{Linux: &specs.Linux{Namespaces: tt.namespaces}})
			require.NoError(t, err)
			require.Equal(t, tt.want, p.Network)
			require.Equal(t, tt.path, p.NetNSPath)
		})
	}
	p, err := FromSpec(t.Context(), request(), ModeSingle, &specs.Spec{})
	require.NoError(t, err)
	require.Equal(t, vc.NetworkHost, p.Network)
	require.False(t, p.HostPID || p.HostIPC, "of a lone container the guest's are meant")
	p, err = FromSpec(t.Context(), request(), ModePause, &specs.Spec{})
	require.NoError(t, err)
	require.True(t, p.HostPID && p.HostIPC)
}

func TestFromSpecModes(t *testing.T) {
	limit := int64(1 << 20)
	spec := &specs.Spec{
		Hostname: "h", Hooks: &specs.Hooks{CreateRuntime: []specs.Hook{{Path: "/hook"}}},
		Linux: &specs.Linux{CgroupsPath: "/a/b", Sysctl: map[string]string{"k": "v"},
			Resources: &specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: &limit}}},
		Annotations: map[string]string{
			"io.kubernetes.cri.sandbox-memory":    "1073741824",
			"io.kubernetes.cri.sandbox-cpu-quota": "200000", "io.kubernetes.cri.sandbox-cpu-period": "100000",
		},
	}
	single, err := FromSpec(t.Context(), request(), ModeSingle, spec)
	require.NoError(t, err)
	require.Equal(t, spec.Hooks, single.Hooks)
	require.Same(t, spec, single.Only, "checked before the VM starts")
	require.Equal(t, spec.Linux.Resources, single.Resources)
	require.Equal(t, "/a/b", single.CgroupsPath)
	require.Equal(t, "h", single.Hostname)
	require.NotNil(t, single.Config)

	pause, err := FromSpec(t.Context(), request(), ModePause, spec)
	require.NoError(t, err)
	require.Nil(t, pause.Hooks)
	require.Nil(t, pause.Only)
	require.Equal(t, int64(1<<30), *pause.Resources.Memory.Limit)
	require.Equal(t, int64(200000), *pause.Resources.CPU.Quota)
	require.Equal(t, uint64(100000), *pause.Resources.CPU.Period)

	spec.Annotations["io.kubernetes.cri.sandbox-memory"] = "much"
	_, err = FromSpec(t.Context(), request(), ModePause, spec)
	require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
}

func TestConfigOfOptionsAndAnnotations(t *testing.T) {
	path := filepath.Join(t.TempDir(), "c.toml")
	require.NoError(t, os.WriteFile(path,
		[]byte("[sizing]\ndefault_vcpus = 3\n[annotations]\nallowed = [\"io.cloister.sizing.memory-mib\"]\n"), 0o600))
	options, err := anypb.New(&runtimeoptions.Options{ConfigPath: path})
	require.NoError(t, err)
	r := request()
	r.Options = options
	p, err := FromCRI(t.Context(), r, &criv1.PodSandboxConfig{Annotations: map[string]string{
		"io.cloister.sizing.memory-mib": "777", "io.cloister.sizing.vcpus": "9",
	}}, "", nil)
	require.NoError(t, err)
	require.Equal(t, 3, p.Config.Sizing.DefaultVCPUs, "not in annotations.allowed")
	require.Equal(t, 777, p.Config.Sizing.DefaultMemoryMiB)
	require.Equal(t, vc.NetworkNew, p.Network)
	require.Nil(t, p.Resources)
	require.Empty(t, p.CgroupsPath)

	r.Options = &anypb.Any{TypeUrl: "other.v1.Options"}
	_, err = FromCRI(t.Context(), r, &criv1.PodSandboxConfig{}, "", nil)
	require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
}

func TestResources(t *testing.T) {
	require.Nil(t, Resources(nil))
	require.Nil(t, Resources(&criv1.LinuxContainerResources{OomScoreAdj: -1}))
	r := Resources(&criv1.LinuxContainerResources{
		CpuShares: 512, CpuQuota: -1, CpusetCpus: "0-1", MemorySwapLimitInBytes: 5,
		HugepageLimits: []*criv1.HugepageLimit{{PageSize: "2MB", Limit: 7}}, Unified: map[string]string{"a": "b"},
	})
	require.Equal(t, uint64(512), *r.CPU.Shares)
	require.Equal(t, int64(-1), *r.CPU.Quota)
	require.Nil(t, r.CPU.Period)
	require.Equal(t, "0-1", r.CPU.Cpus)
	require.Equal(t, int64(5), *r.Memory.Swap)
	require.Equal(t, uint64(7), r.HugepageLimits[0].Limit)
	require.Equal(t, "b", r.Unified["a"])
}

func TestHolder(t *testing.T) {
	var h Holder
	_, _, _, err := h.Get()
	require.ErrorIs(t, err, errdefs.ErrNotFound)
	require.NoError(t, h.Claim(ModeSandbox, "s"))
	require.ErrorIs(t, h.Claim(ModeSingle, "c"), errdefs.ErrAlreadyExists)
	_, id, mode, err := h.Get()
	require.ErrorIs(t, err, errdefs.ErrNotFound)
	require.Equal(t, "s", id)
	require.Equal(t, ModeSandbox, mode)
	h.Release()
	require.Equal(t, ModeNone, h.Mode())
}

func TestSysctls(t *testing.T) {
	asked := map[string]string{"net.ipv4.ip_forward": "1", "kernel.sem": "1 2 3 4", "kernel.domainname": "d"}
	spec := &specs.Spec{Linux: &specs.Linux{Sysctl: asked}}
	single, err := FromSpec(t.Context(), request(), ModeSingle, spec)
	require.NoError(t, err)
	require.Equal(t, map[string]string{"net.ipv4.ip_forward": "1"}, single.Sysctls, "the others are the container's")
	require.Len(t, asked, 3, "the caller's own stays as it is")
	pause, err := FromSpec(t.Context(), request(), ModePause, spec)
	require.NoError(t, err)
	require.Equal(t, asked, pause.Sysctls)

	pod, err := FromCRI(t.Context(), request(), &criv1.PodSandboxConfig{Linux: &criv1.LinuxPodSandboxConfig{Sysctls: map[string]string{
		"net.ipv4.ip_unprivileged_port_start": "1024", "kernel.sem": "1 2 3 4",
	}}}, "", nil)
	require.NoError(t, err)
	require.Equal(t, map[string]string{
		"net.ipv4.ip_unprivileged_port_start": "1024", "net.ipv4.ping_group_range": "0 2147483647", "kernel.sem": "1 2 3 4",
	}, pod.Sysctls, "what containerd gives by itself, and what the pod wants instead")
}

func TestOptions(t *testing.T) {
	started := &anypb.Any{TypeUrl: "runtimeoptions.v1.Options"}
	kept := func() (*anypb.Any, error) { return started, nil }
	other := &anypb.Any{TypeUrl: "other.v1.Options"}
	for _, tc := range []struct{ task, want *anypb.Any }{
		{nil, started}, {&anypb.Any{}, started}, {&anypb.Any{TypeUrl: "containerd.runc.v1.Options"}, started}, {other, other},
	} {
		got, err := Options(t.Context(), tc.task, kept)
		require.NoError(t, err)
		require.Same(t, tc.want, got)
	}
	_, err := Options(t.Context(), &anypb.Any{TypeUrl: "containerd.runc.v1.Options", Value: []byte{0xff}}, kept)
	require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
}

func TestUserNamespaces(t *testing.T) {
	line := func(container, length uint32) []*criv1.IDMapping {
		return []*criv1.IDMapping{{HostId: 1000, ContainerId: container, Length: length}}
	}
	const pod, node = criv1.NamespaceMode_POD, criv1.NamespaceMode_NODE
	for _, tc := range []struct {
		users *criv1.UserNamespace
		says  string // why it is refused
	}{
		{nil, ""},
		{&criv1.UserNamespace{Mode: node}, ""},
		{&criv1.UserNamespace{Mode: pod, Uids: line(0, 65536), Gids: line(0, 65536)}, ""},
		{&criv1.UserNamespace{Mode: node, Uids: line(0, 65536)}, "and a map as well"},
		{&criv1.UserNamespace{Mode: criv1.NamespaceMode_CONTAINER}, "CONTAINER"},
		{&criv1.UserNamespace{Mode: criv1.NamespaceMode_TARGET, Uids: line(0, 1), Gids: line(0, 1)}, "TARGET"},
		{&criv1.UserNamespace{Mode: pod}, "0 ranges of users"},
		{&criv1.UserNamespace{Mode: pod, Uids: append(line(0, 1), line(1, 1)...), Gids: line(0, 1)}, "2 ranges of users and 1 of groups"},
		{&criv1.UserNamespace{Mode: pod, Uids: line(0, 1), Gids: line(1, 1)}, "root (0) is not mapped"},
		{&criv1.UserNamespace{Mode: pod, Uids: line(0, 0), Gids: line(0, 1)}, "empty"},
	} {
		_, err := FromCRI(t.Context(), request(), &criv1.PodSandboxConfig{Linux: &criv1.LinuxPodSandboxConfig{
			SecurityContext: &criv1.LinuxSandboxSecurityContext{NamespaceOptions: &criv1.NamespaceOption{UsernsOptions: tc.users}},
		}}, "", nil)
		if tc.says == "" {
			require.NoError(t, err)
			continue
		}
		require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
		require.ErrorContains(t, err, tc.says)
	}
}
