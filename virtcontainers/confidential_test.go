// SPDX-License-Identifier: Apache-2.0

package virtcontainers

import (
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"github.com/stretchr/testify/require"

	"github.com/cloister-project/cloister/configs"
	"github.com/cloister-project/cloister/tee"
	"github.com/cloister-project/cloister/virtcontainers/vmplan"
)

// testConfig is a configuration of a platform with what every one has.
func testConfig(name tee.Name) *configs.Config {
	return &configs.Config{Hypervisor: configs.Hypervisor{Kind: configs.KindQEMU, Arch: configs.ArchAMD64},
		TEE: configs.TEE{Platform: string(name)}}
}

func testPlan(t *testing.T, cfg *configs.Config) *vmplan.Plan {
	t.Helper()
	plan, err := vmplan.New(vmplan.Pod{ID: "p", Config: cfg})
	require.NoError(t, err)
	return plan
}

func bind(source, destination string, options ...string) specs.Mount {
	return specs.Mount{Type: "bind", Source: source, Destination: destination, Options: append([]string{"rbind"}, options...)}
}

func TestConfidentialPodIsToldEverythingAtOnce(t *testing.T) {
	only := &specs.Spec{
		Process: &specs.Process{},
		Linux:   &specs.Linux{Devices: []specs.LinuxDevice{{Path: "/dev/kvm"}, {Path: "/dev/sda"}}},
		Mounts:  []specs.Mount{bind("/srv/one", "/1"), bind("/srv/two", "/2", "rshared"), bind("/etc/passwd", "/3")},
	}
	cfg := PodConfig{
		ID: "p", Network: NetworkHost, HostPID: true, HostIPC: true, Only: only,
		Config: &configs.Config{
			TEE: configs.TEE{Platform: string(tee.Sample)}, Log: configs.Log{DebugConsole: true},
			Hypervisor: configs.Hypervisor{KernelParams: []string{"cloister.tee=snp"}},
		},
	}
	_, err := NewPod(t.Context(), cfg)
	var refused *RefusedError
	require.ErrorAs(t, err, &refused)
	require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
	for _, word := range []string{
		"hostNetwork", "hostPID", "hostIPC", "log.debug_console", "cloister.tee=snp", "/dev/kvm, /dev/sda", "privileged_without_host_devices",
		"/srv/one at /1", "Bidirectional", "/etc/passwd at /3",
	} {
		require.ErrorContains(t, err, word)
	}
	require.Len(t, refused.Reasons, 9)
}

// What is wrong with the only container is told before its VM starts, on every platform.
func TestOnlyContainerIsCheckedWithItsPod(t *testing.T) {
	for _, name := range []tee.Name{tee.None, tee.Sample} {
		cfg := PodConfig{ID: "p", Config: testConfig(name), Only: &specs.Spec{
			Process: &specs.Process{}, Linux: &specs.Linux{Devices: []specs.LinuxDevice{{Path: "/dev/sda"}}},
			Mounts: []specs.Mount{bind("/dev/null", "/null")},
		}}
		_, err := NewPod(t.Context(), cfg)
		require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
		require.ErrorContains(t, err, "/dev/sda")
		require.ErrorContains(t, err, "/dev/null")
		cfg.Only = &specs.Spec{}
		_, err = NewPod(t.Context(), cfg)
		require.ErrorContains(t, err, "no process")
	}
}
