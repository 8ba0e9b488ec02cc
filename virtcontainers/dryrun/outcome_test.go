// SPDX-License-Identifier: Apache-2.0

package dryrun

import (
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
	"github.com/stretchr/testify/require"

	"github.com/cloister-project/cloister/configs"
	"github.com/cloister-project/cloister/virtcontainers/vmplan"
)

func TestOutcomeOfAMount(t *testing.T) {
	const pod = "/var/lib/kubelet/pods/00000000-0000-0000-0000-000000000000"
	ordinary := &configs.Config{Hypervisor: configs.Hypervisor{Arch: configs.ArchAMD64}}
	apart := &configs.Config{Hypervisor: configs.Hypervisor{Arch: configs.ArchAMD64}, TEE: configs.TEE{Platform: "sample"}}
	s390x := &configs.Config{Hypervisor: configs.Hypervisor{Arch: configs.ArchS390X}}
	for _, tc := range []struct {
		source, destination string
		options             []string
		ordinary, apart     Outcome
	}{
		{pod + "/volumes/kubernetes.io~configmap/c", "/c", nil, Copied, Copied},
		{pod + "/volumes/kubernetes.io~empty-dir/e", "/e", nil, InGuest, InGuest},
		{pod + "/volumes/kubernetes.io~empty-dir/e/part", "/e", nil, InGuest, InGuest},
		{pod + "/volumes/kubernetes.io~csi/v", "/v", nil, Shared, Refused},
		{pod + "/volume-subpaths/c/main/0", "/c", nil, Copied, Copied},
		{pod + "/containers/main/1234", "/dev/termination-log", nil, Shared, Copied},
		{pod + "/etc-hosts", "/etc/hosts", nil, Copied, Copied},
		{"/dev/shm", "/dev/shm", nil, InGuest, InGuest},
		{"/srv", "/srv", nil, Shared, Refused},
		{"/srv", "/srv", []string{"rshared"}, Refused, Refused},
		{"/srv", "relative", nil, Refused, Refused},
	} {
		m := specs.Mount{Source: tc.source, Destination: tc.destination, Type: "bind", Options: tc.options}
		for cfg, want := range map[*configs.Config]Outcome{ordinary: tc.ordinary, apart: tc.apart, s390x: tc.apart} {
			got, detail := outcomeOf(m, vmplan.SharingOf(cfg))
			require.Equal(t, want, got, "%+v with %q on %s", m, cfg.TEE.Platform, cfg.Hypervisor.Arch)
			require.NotEmpty(t, detail)
		}
	}
}
