// SPDX-License-Identifier: Apache-2.0

package virtcontainers

import (
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
	"github.com/stretchr/testify/require"

	"github.com/cloister-project/cloister/configs"
	"github.com/cloister-project/cloister/tee/platform"
)

func TestMountOutcome(t *testing.T) {
	const pod = "/var/lib/kubelet/pods/00000000-0000-0000-0000-000000000000"
	ordinary := &configs.Config{Hypervisor: configs.Hypervisor{Arch: configs.ArchAMD64}}
	apart := &configs.Config{Hypervisor: configs.Hypervisor{Arch: configs.ArchAMD64}, TEE: configs.TEE{Platform: "sample"}}
	s390x := &configs.Config{Hypervisor: configs.Hypervisor{Arch: configs.ArchS390X}}
	for _, tc := range []struct {
		source, destination string
		options             []string
		ordinary, apart     Outcome
	}{
		{pod + "/volumes/kubernetes.io~configmap/c", "/c", nil, MountShared, MountCopied},
		{pod + "/volumes/kubernetes.io~empty-dir/e", "/e", nil, MountShared, MountScratch},
		{pod + "/volumes/kubernetes.io~empty-dir/e/part", "/e", nil, MountShared, MountRefused},
		{pod + "/volumes/kubernetes.io~csi/v", "/v", nil, MountShared, MountRefused},
		{pod + "/volume-subpaths/c/main/0", "/c", nil, MountShared, MountCopied},
		{pod + "/containers/main/1234", "/dev/termination-log", nil, MountShared, MountCopied},
		{pod + "/etc-hosts", "/etc/hosts", nil, MountCopied, MountCopied},
		{"/dev/shm", "/dev/shm", nil, MountScratch, MountScratch},
		{"/srv", "/srv", nil, MountShared, MountRefused},
		{"/srv", "/srv", []string{"rshared"}, MountRefused, MountRefused},
		{"/srv", "relative", nil, MountRefused, MountRefused},
	} {
		m := specs.Mount{Source: tc.source, Destination: tc.destination, Type: "bind", Options: tc.options}
		for cfg, want := range map[*configs.Config]Outcome{ordinary: tc.ordinary, apart: tc.apart, s390x: tc.apart} {
			got, detail := MountOutcome(cfg, m)
			require.Equal(t, want, got, "%+v with %q on %s", m, cfg.TEE.Platform, cfg.Hypervisor.Arch)
			require.NotEmpty(t, detail)
		}
	}
}

// What CheckPod says is what NewPod says, and it makes nothing.
func TestCheckPod(t *testing.T) {
	dir := t.TempDir()
	cfg := PodConfig{ID: "p", Network: NetworkHost, Config: &configs.Config{
		Hypervisor: configs.Hypervisor{Kind: configs.KindQEMU}, Rootfs: configs.Rootfs{CacheDir: dir + "/cache"},
	}}
	_, err := CheckPod(cfg, platform.Options{})
	var refused *RefusedError
	require.ErrorAs(t, err, &refused)
	_, same := NewPod(t.Context(), cfg)
	require.EqualError(t, same, err.Error())
	cfg.Network = NetworkNew
	plan, err := CheckPod(cfg, platform.Options{})
	require.NoError(t, err)
	require.NotNil(t, plan.Driver())
	require.NoDirExists(t, dir+"/cache")
}
