// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
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
