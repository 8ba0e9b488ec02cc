// SPDX-License-Identifier: Apache-2.0

package virtcontainers

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/cloister-project/cloister/virtcontainers/mounts"
)

func TestSaveTermination(t *testing.T) {
	dir := t.TempDir()
	path, victim := filepath.Join(dir, "log"), filepath.Join(dir, "victim")
	for _, p := range []string{path, victim} {
		require.NoError(t, os.WriteFile(p, []byte("what was there before"), 0o600))
	}
	plan := &containerPlan{mounts: []mounts.Mount{{Kind: mounts.Live, Source: victim}, {Kind: mounts.TerminationLog, Source: path}}}
	c := &Container{id: "c", terminationLog: plan.terminationLog()}
	content := func(path string) string {
		b, err := os.ReadFile(path)
		require.NoError(t, err)
		return string(b)
	}
	c.saveTermination(t.Context(), nil)
	require.Equal(t, "what was there before", content(path), "the container said nothing")
	c.saveTermination(t.Context(), []byte(strings.Repeat("x", 4097)))
	require.Equal(t, "what was there before", content(path), "no honest guest says so much")
	c.saveTermination(t.Context(), []byte("bye"))
	require.Equal(t, "bye", content(path))

	// What has taken the file's place is left alone.
	require.NoError(t, os.Remove(path))
	c.saveTermination(t.Context(), []byte("bye"))
	require.NoFileExists(t, path)
	require.NoError(t, os.Symlink(victim, path))
	c.saveTermination(t.Context(), []byte("bye"))
	require.Equal(t, "what was there before", content(victim))
	require.NoError(t, os.Remove(path))
	require.NoError(t, unix.Mkfifo(path, 0o600))
	c.saveTermination(t.Context(), []byte("bye")) // and it does not wait

	(&Container{id: "none"}).saveTermination(t.Context(), []byte("bye"))
	require.Empty(t, (&containerPlan{}).terminationLog())
}
