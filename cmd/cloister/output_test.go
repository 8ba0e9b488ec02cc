// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// writing is content that does something while it is written.
type writing func(w io.Writer) (int64, error)

func (f writing) WriteTo(w io.Writer) (int64, error) { return f(w) }

var outputs = map[string]func(context.Context, string, bool, io.WriterTo) error{"unnamed": writeOutput, "named": writeNamed}

func TestWriteOutputIsAllOrNothing(t *testing.T) {
	failing := writing(func(w io.Writer) (int64, error) {
		_, _ = io.Copy(w, strings.NewReader("half"))
		return 4, errors.New("disk is full")
	})
	for name, write := range outputs {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			path := filepath.Join(dir, "out")
			text := func() string {
				content, err := os.ReadFile(path)
				require.NoError(t, err)
				return string(content)
			}
			require.ErrorContains(t, write(t.Context(), path, false, failing), "disk is full")
			require.NoFileExists(t, path)
			require.NoError(t, write(t.Context(), path, true, strings.NewReader("old")), "nothing to replace")
			require.ErrorContains(t, write(t.Context(), path, true, failing), "disk is full")
			require.ErrorIs(t, write(t.Context(), path, false, bytes.NewReader(nil)), os.ErrExist)
			gone, cancel := context.WithCancel(t.Context())
			cancel()
			require.ErrorIs(t, write(gone, path, true, strings.NewReader("late")), context.Canceled)
			assert.Equal(t, "old", text())
			require.NoError(t, write(t.Context(), path, true, strings.NewReader("new")))
			assert.Equal(t, "new", text())
			fi, err := os.Stat(path)
			require.NoError(t, err)
			assert.Equal(t, os.FileMode(0o600), fi.Mode().Perm())
			require.NoError(t, os.Mkdir(filepath.Join(dir, "directory"), 0o700))
			require.Error(t, write(t.Context(), filepath.Join(dir, "directory"), true, strings.NewReader("x")), "a directory is not replaced")
			entries, err := os.ReadDir(dir)
			require.NoError(t, err)
			assert.Len(t, entries, 2, "nothing half-written stays")
			require.ErrorIs(t, write(t.Context(), filepath.Join(dir, "none", "out"), false, strings.NewReader("x")), os.ErrNotExist)
		})
	}
}

// A process that is killed while it writes a secret leaves nothing: the file has no name yet.
func TestWriteOutputHasNoNameUntilItStands(t *testing.T) {
	dir := t.TempDir()
	f, err := unnamedFile(dir)
	if errors.Is(err, errors.ErrUnsupported) {
		t.Skipf("the file system of %s has no O_TMPFILE", dir)
	}
	require.NoError(t, err)
	require.NoError(t, f.Close())
	for _, force := range []bool{false, true} {
		written := false
		require.NoError(t, writeOutput(t.Context(), filepath.Join(dir, "out"), force, writing(func(w io.Writer) (int64, error) {
			n, err := io.WriteString(w, "secret")
			entries, lerr := os.ReadDir(dir)
			require.NoError(t, lerr)
			for _, e := range entries {
				require.Equal(t, "out", e.Name())
			}
			require.True(t, force || len(entries) == 0)
			written = true
			return int64(n), err
		})))
		require.True(t, written)
	}
}
