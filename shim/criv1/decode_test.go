// SPDX-License-Identifier: Apache-2.0

package criv1

import (
	"encoding/json"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/containerd/typeurl/v2"
	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/anypb"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// full is a configuration as CRI's own messages have it, with fields that we leave out.
func full() *runtime.PodSandboxConfig {
	return &runtime.PodSandboxConfig{
		Metadata:     &runtime.PodSandboxMetadata{Name: "web", Uid: "u-1", Namespace: "default", Attempt: 2},
		Hostname:     "web-0",
		LogDirectory: "/var/log/pods/web",
		DnsConfig:    &runtime.DNSConfig{Servers: []string{"10.0.0.10"}, Searches: []string{"svc.local"}, Options: []string{"ndots:5"}},
		PortMappings: []*runtime.PortMapping{{HostPort: 80, ContainerPort: 8080}},
		Labels:       map[string]string{"app": "web"},
		Annotations:  map[string]string{"io.cloister.sizing.vcpus": "2"},
		Linux: &runtime.LinuxPodSandboxConfig{
			CgroupParent: "kubepods.slice",
			SecurityContext: &runtime.LinuxSandboxSecurityContext{
				NamespaceOptions: &runtime.NamespaceOption{
					Network: runtime.NamespaceMode_NODE, Pid: runtime.NamespaceMode_CONTAINER, Ipc: runtime.NamespaceMode_POD,
				},
				RunAsUser: &runtime.Int64Value{Value: 1000},
			},
			Sysctls:  map[string]string{"net.core.somaxconn": "1024"},
			Overhead: &runtime.LinuxContainerResources{MemoryLimitInBytes: 64 << 20},
			Resources: &runtime.LinuxContainerResources{CpuPeriod: 100000, CpuQuota: 200000, MemoryLimitInBytes: 512 << 20,
				Unified: map[string]string{"memory.high": "1"}},
		},
	}
}

func TestDecode(t *testing.T) {
	packed, err := typeurl.MarshalAnyToProto(full())
	require.NoError(t, err)
	require.Equal(t, TypeURL, packed.GetTypeUrl())

	got, err := Decode(packed)
	require.NoError(t, err)
	require.Equal(t, "web", got.GetMetadata().GetName())
	require.Equal(t, uint32(2), got.GetMetadata().GetAttempt())
	require.Equal(t, "web-0", got.GetHostname())
	require.Equal(t, []string{"ndots:5"}, got.GetDnsConfig().GetOptions())
	require.Equal(t, "2", got.GetAnnotations()["io.cloister.sizing.vcpus"])
	require.Equal(t, "kubepods.slice", got.GetLinux().GetCgroupParent())
	require.Equal(t, NamespaceMode_NODE, got.GetLinux().GetSecurityContext().GetNamespaceOptions().GetNetwork())
	require.Equal(t, NamespaceMode_CONTAINER, got.GetLinux().GetSecurityContext().GetNamespaceOptions().GetPid())
	require.Equal(t, int64(200000), got.GetLinux().GetResources().GetCpuQuota())
	require.Equal(t, int64(64<<20), got.GetLinux().GetOverhead().GetMemoryLimitInBytes())
	require.Equal(t, "1024", got.GetLinux().GetSysctls()["net.core.somaxconn"])
}

func TestDecodeNothing(t *testing.T) {
	for _, options := range []*anypb.Any{nil, {}} {
		got, err := Decode(options)
		require.NoError(t, err)
		require.True(t, proto.Equal(&PodSandboxConfig{}, got))
	}
}

func TestDecodeRefuses(t *testing.T) {
	for name, options := range map[string]*anypb.Any{
		"another type": {TypeUrl: "runtime.v1.ContainerConfig"},
		"no type":      {Value: []byte{8}},
		"malformed":    {TypeUrl: TypeURL, Value: []byte{0x0a, 0xff}},
		"not UTF-8":    {TypeUrl: TypeURL, Value: []byte{0x12, 1, 0xff}},
		"too large":    {TypeUrl: TypeURL, Value: make([]byte, maxConfigBytes+1)},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := Decode(options)
			require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
		})
	}
}

// TestWireCompatible compares every field of ours with CRI's field of the same number.
func TestWireCompatible(t *testing.T) {
	seen := map[protoreflect.FullName]bool{}
	var compare func(ours, theirs protoreflect.MessageDescriptor)
	compare = func(ours, theirs protoreflect.MessageDescriptor) {
		if seen[ours.FullName()] {
			return
		}
		seen[ours.FullName()] = true
		for i := range ours.Fields().Len() {
			f := ours.Fields().Get(i)
			g := theirs.Fields().ByNumber(f.Number())
			require.NotNil(t, g, f.FullName())
			require.Equal(t, g.Name(), f.Name())
			require.Equal(t, g.Kind(), f.Kind(), f.FullName())
			require.Equal(t, g.Cardinality(), f.Cardinality(), f.FullName())
			require.Equal(t, g.IsMap(), f.IsMap(), f.FullName())
			if f.Kind() == protoreflect.MessageKind && !f.IsMap() {
				compare(f.Message(), g.Message())
			}
			if f.Kind() == protoreflect.EnumKind {
				for j := range f.Enum().Values().Len() {
					v := f.Enum().Values().Get(j)
					require.Equal(t, g.Enum().Values().ByNumber(v.Number()).Name(), v.Name())
				}
			}
		}
	}
	compare((&PodSandboxConfig{}).ProtoReflect().Descriptor(), (&runtime.PodSandboxConfig{}).ProtoReflect().Descriptor())
}

func TestDecodeUpdate(t *testing.T) {
	theirs := struct {
		Overhead  *runtime.LinuxContainerResources
		Resources *runtime.LinuxContainerResources
	}{Resources: &runtime.LinuxContainerResources{CpuQuota: 50000, MemoryLimitInBytes: 1 << 30}}
	data, err := json.Marshal(theirs)
	require.NoError(t, err)
	got, err := DecodeUpdate(&anypb.Any{TypeUrl: UpdatedResourcesTypeURL, Value: data})
	require.NoError(t, err)
	require.Nil(t, got.Overhead)
	require.Equal(t, int64(50000), got.Resources.GetCpuQuota())
	require.Equal(t, int64(1<<30), got.Resources.GetMemoryLimitInBytes())

	for _, bad := range []*anypb.Any{nil, {TypeUrl: "x"}, {TypeUrl: UpdatedResourcesTypeURL, Value: []byte("[]")}} {
		_, err := DecodeUpdate(bad)
		require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
	}
}

func FuzzDecode(f *testing.F) {
	packed, err := typeurl.MarshalAnyToProto(full())
	if err != nil {
		f.Fatal(err)
	}
	f.Add(packed.GetValue())
	f.Add([]byte{})
	f.Add([]byte{0x42, 2, 0x12, 0})
	f.Fuzz(func(t *testing.T, data []byte) {
		ours, err := Decode(&anypb.Any{TypeUrl: TypeURL, Value: data})
		theirs := &runtime.PodSandboxConfig{}
		theirErr := proto.Unmarshal(data, theirs)
		if theirErr == nil && err != nil {
			t.Fatalf("CRI's decoder takes it, ours does not: %v", err)
		}
		if theirErr == nil && (ours.GetHostname() != theirs.GetHostname() || len(ours.GetAnnotations()) != len(theirs.GetAnnotations())) {
			t.Fatal("the decoders differ")
		}
	})
}

func FuzzDecodeUpdate(f *testing.F) {
	f.Add([]byte(`{"Overhead":null,"Resources":{"cpu_quota":1}}`))
	f.Add([]byte(`{"Resources":{"unified":{"a":"b"}}}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		if _, err := DecodeUpdate(&anypb.Any{TypeUrl: UpdatedResourcesTypeURL, Value: data}); err != nil && !errdefs.IsInvalidArgument(err) {
			t.Fatal(err)
		}
	})
}
