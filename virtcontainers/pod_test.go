// SPDX-License-Identifier: Apache-2.0

package virtcontainers

import (
	"context"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"

	"github.com/cloister-project/cloister/tee"
)

func TestNewPodRefusesTheHostsNamespacesAtOnce(t *testing.T) {
	_, err := NewPod(context.Background(), PodConfig{ID: "p", Config: testConfig(tee.None), Network: NetworkHost, HostPID: true, HostIPC: true})
	require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
	for _, word := range []string{"hostNetwork", "hostPID", "hostIPC"} {
		require.ErrorContains(t, err, word)
	}
	_, err = NewPod(context.Background(), PodConfig{ID: "../p"})
	require.ErrorContains(t, err, "sandbox id")
}
