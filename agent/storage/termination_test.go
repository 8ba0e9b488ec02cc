// SPDX-License-Identifier: Apache-2.0

package storage

import (
	"os"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"

	agentv1 "github.com/cloister-project/cloister/agent-protocol/v1"
)

func TestTerminationMessage(t *testing.T) {
	s, _ := newStore(t)
	log := func() *agentv1.Mount { return file(&agentv1.FileCopy{Mode: 0o666, TerminationLog: true}) }
	_, err := s.PrepareMounts(t.Context(), "c", []*agentv1.Mount{log(), log()})
	require.ErrorIs(t, err, errdefs.ErrInvalidArgument)

	got, err := s.PrepareMounts(t.Context(), "c", []*agentv1.Mount{file(&agentv1.FileCopy{Content: []byte("other"), Mode: 0o600}), log()})
	require.NoError(t, err)
	path := got[1].Source
	for _, tc := range []struct{ written, want string }{
		{"", ""}, {"short", "short"}, {strings.Repeat("a", 4096), strings.Repeat("a", 4096)},
		{"begin" + strings.Repeat("b", 4096), strings.Repeat("b", 4096)},
	} {
		require.NoError(t, os.WriteFile(path, []byte(tc.written), 0o600))
		message, err := s.TerminationMessage("c")
		require.NoError(t, err)
		require.Equal(t, tc.want, string(message))
	}
	require.NoError(t, os.Truncate(path, 1<<40), "of a size that nobody could read")
	message, err := s.TerminationMessage("c")
	require.NoError(t, err)
	require.Len(t, message, 4096)

	_, err = s.PrepareMounts(t.Context(), "none", []*agentv1.Mount{file(&agentv1.FileCopy{Mode: 0o600})})
	require.NoError(t, err)
	for _, id := range []string{"none", "unknown"} {
		message, err = s.TerminationMessage(id)
		require.NoError(t, err)
		require.Empty(t, message)
	}
	for _, id := range []string{"c", "none"} {
		_, err = s.Remove(t.Context(), id)
		require.NoError(t, err)
	}
}
