// SPDX-License-Identifier: Apache-2.0

package virtcontainers

import (
	"maps"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
)

// drawn reads the moves that the package comment draws below a heading: "from, from --reason--> to", one a line.
func drawn[S ~string](t *testing.T, heading string) map[S][]S {
	t.Helper()
	doc, err := os.ReadFile("doc.go")
	require.NoError(t, err)
	_, section, found := strings.Cut(string(doc), "// # "+heading+"\n")
	require.True(t, found, heading)
	section, _, _ = strings.Cut(section, "// # ")
	moves := map[S][]S{}
	arrow := regexp.MustCompile(`(?m)^//\t([a-z, ]+) --[^>]+--> ([a-z]+)$`)
	for _, m := range arrow.FindAllStringSubmatch(section, -1) {
		for _, from := range strings.Split(m[1], ", ") {
			moves[S(from)] = append(moves[S(from)], S(m[2]))
		}
	}
	return moves
}

// checkTable compares a table with its picture, and tries every move there could be.
func checkTable[S ~string](t *testing.T, heading string, table map[S][]S, try func(from, to S) (S, error)) {
	t.Helper()
	pictured := drawn[S](t, heading)
	for from, to := range table {
		require.ElementsMatch(t, to, pictured[from], "from %s", from)
		delete(pictured, from)
	}
	require.Empty(t, pictured, "only in the picture")
	states := slices.Sorted(maps.Keys(table))
	for _, from := range states {
		for _, to := range states {
			is, err := try(from, to)
			if slices.Contains(table[from], to) {
				require.NoError(t, err, "%s to %s", from, to)
				require.Equal(t, to, is)
				continue
			}
			require.ErrorIs(t, err, errdefs.ErrFailedPrecondition, "%s to %s", from, to)
			require.Equal(t, from, is, "a move that is refused changes nothing")
		}
	}
}

func TestStatesOfAPod(t *testing.T) {
	checkTable(t, "States of a pod", podMoves, func(from, to PodState) (PodState, error) {
		p := &Pod{cfg: PodConfig{ID: "p"}, state: from}
		err := p.moveLocked(to)
		return p.state, err
	})
}

func TestStatesOfAProcess(t *testing.T) {
	checkTable(t, "States of a process", processMoves, func(from, to ProcessStatus) (ProcessStatus, error) {
		p := &Process{container: &Container{id: "c"}, status: from}
		err := p.move(from, to)
		return p.status, err
	})
	p := &Process{container: &Container{id: "c"}, status: ProcessStopped}
	require.ErrorIs(t, p.move(ProcessCreated, ProcessRunning), errdefs.ErrFailedPrecondition, "it is in another state")
	require.Equal(t, ProcessStopped, p.status)
}
