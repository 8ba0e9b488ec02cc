// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/cloister-project/cloister/test/harness"
)

// TestPlatformByOptions runs a pod whose platform stands in containerd's options for the handler, as
// configs/containerd-config.toml shows it, over the node's ordinary configuration.
func TestPlatformByOptions(t *testing.T) {
	n := sharedNode(t)
	pod := runPod(t, n, harness.PodSpec{Handler: harness.HandlerOptions})
	_, info, err := pod.Status(testContext(t))
	require.NoError(t, err)
	assert.Contains(t, fmt.Sprint(info), "NO PROTECTION")
	c := runContainer(t, pod, harness.ContainerSpec{})
	assert.Contains(t, output(t, c, "cat /proc/cmdline"), " cloister.tee=sample ")
}

// TestCloudHypervisorIsRefused asks for Cloud Hypervisor where there is none, where the one there is cannot be used, and for
// what it does not do: each ends before a process starts. The program here is none; it says a release's name.
func TestCloudHypervisorIsRefused(t *testing.T) {
	n := sharedNode(t)
	says := func(version string) string {
		path := filepath.Join(n.Dir, "cloud-hypervisor-"+version)
		require.NoError(t, os.WriteFile(path, []byte("#!/bin/sh\necho cloud-hypervisor "+version+"\n"), 0o700))
		return path
	}
	old, recent := says("v52.0.0"), says("v53.0.0")
	for name, c := range map[string]struct {
		handler, settings string
		want              []string
	}{
		"is not there": {"", "path = '/nonexistent/cloud-hypervisor'", []string{"/nonexistent/cloud-hypervisor", "hypervisor.path"}},
		"is too old":   {"", fmt.Sprintf("path = %q", old), []string{old, "v52.0.0", "install v53 or newer"}},
		"emulation":    {"", fmt.Sprintf("path = %q\naccel = 'tcg'", recent), []string{"does not emulate", "hypervisor.accel"}},
		"a vsock that it lacks": {"", fmt.Sprintf("path = %q\nvsock = 'vhost'", recent),
			[]string{"hypervisor.vsock", `"vhost" is nothing that hypervisor.kind = "cloudhypervisor" has`}},
		"a confidential platform": {harness.HandlerOptions, fmt.Sprintf("path = %q", recent),
			[]string{`platform "sample"`, `hypervisor.kind "qemu"`}},
		"s390x": {"", fmt.Sprintf("path = %q\narch = 's390x'", recent), []string{"s390x", `hypervisor.kind = "qemu"`}},
	} {
		t.Run(name, func(t *testing.T) {
			withSettings(t, n, "[hypervisor]\nkind = 'cloudhypervisor'\n"+c.settings)
			requireNoPod(t, n, harness.PodSpec{Handler: c.handler}, c.want...)
		})
	}
}
