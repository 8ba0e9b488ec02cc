// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"fmt"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"

	agentv1 "github.com/cloister-project/cloister/agent-protocol/v1"
	"github.com/cloister-project/cloister/agent-protocol/wire"
)

func TestStorageUsage(t *testing.T) {
	many := func(n int) map[string]*agentv1.Usage {
		out := map[string]*agentv1.Usage{}
		for i := range n {
			out[fmt.Sprintf("n%d", i)] = &agentv1.Usage{}
		}
		return out
	}
	got, err := storageUsage(&agentv1.SandboxStatsResponse{
		ScratchDisk:    &agentv1.Usage{UsedBytes: 3, LimitBytes: 9, UsedInodes: 2},
		WritableLayers: map[string]*agentv1.Usage{"c": {UsedBytes: 1, UsedInodes: 4}},
		ScratchVolumes: map[string]*agentv1.Usage{"tmp": {UsedBytes: 2, Memory: true}, "nil": nil},
	})
	require.NoError(t, err)
	require.Equal(t, &StorageUsage{
		ScratchDisk:    &Usage{UsedBytes: 3, LimitBytes: 9, UsedInodes: 2},
		WritableLayers: map[string]Usage{"c": {UsedBytes: 1, UsedInodes: 4}},
		EmptyDirs:      map[string]Usage{"tmp": {UsedBytes: 2, Memory: true}, "nil": {}},
	}, got)
	got, err = storageUsage(&agentv1.SandboxStatsResponse{})
	require.NoError(t, err)
	require.Nil(t, got.ScratchDisk)

	for name, c := range map[string]struct {
		resp *agentv1.SandboxStatsResponse
		kind error
	}{
		"too many containers": {&agentv1.SandboxStatsResponse{WritableLayers: many(wire.MaxContainers + 1)}, errdefs.ErrOutOfRange},
		"too many volumes":    {&agentv1.SandboxStatsResponse{ScratchVolumes: many(wire.MaxVolumes + 1)}, errdefs.ErrOutOfRange},
		"container": {
			&agentv1.SandboxStatsResponse{WritableLayers: map[string]*agentv1.Usage{"\x1b[2J": {}}}, errdefs.ErrInvalidArgument,
		},
		"volume": {&agentv1.SandboxStatsResponse{ScratchVolumes: map[string]*agentv1.Usage{"a/b": {}}}, errdefs.ErrInvalidArgument},
		"volume's length": {
			&agentv1.SandboxStatsResponse{ScratchVolumes: map[string]*agentv1.Usage{strings.Repeat("a", 65): {}}}, errdefs.ErrInvalidArgument,
		},
	} {
		_, err := storageUsage(c.resp)
		require.ErrorIs(t, err, c.kind, name)
	}
}
