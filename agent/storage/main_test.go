// SPDX-License-Identifier: Apache-2.0

package storage

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/erofs/go-erofs"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/cloister-project/cloister/internal/mountstest"
)

// TestMain keeps what the tests mount to themselves.
func TestMain(m *testing.M) { mountstest.Main(m) }

// fakeDisks are files instead of disks: EROFS mounts both.
type fakeDisks struct {
	mu    sync.Mutex
	files map[string]string // path by serial
	found int
}

func (f *fakeDisks) close() {}

func (f *fakeDisks) find(ctx context.Context, serial string) (*os.File, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	path, ok := f.files[serial]
	if !ok {
		return nil, fmt.Errorf("disk with serial number %s: %w", serial, context.DeadlineExceeded)
	}
	f.found++
	return os.Open(path)
}

// add makes a disk with a file system of the files; values are contents.
func (f *fakeDisks) add(t *testing.T, serial string, files map[string]string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), serial+".erofs")
	writeImage(t, path, files)
	f.mu.Lock()
	defer f.mu.Unlock()
	f.files[serial] = path
}

func writeImage(t *testing.T, path string, files map[string]string) {
	t.Helper()
	tree := t.TempDir()
	for name, content := range files {
		full := filepath.Join(tree, name)
		require.NoError(t, os.MkdirAll(filepath.Dir(full), 0o755))
		require.NoError(t, os.WriteFile(full, []byte(content), 0o644))
	}
	require.NoError(t, os.Chmod(tree, 0o751))
	out, err := os.Create(path)
	require.NoError(t, err)
	w := erofs.Create(out)
	require.NoError(t, w.CopyFrom(os.DirFS(tree)))
	require.NoError(t, w.Close())
	require.NoError(t, out.Close())
}

// newStore makes a Store and checks in the end that it left nothing.
func newStore(t *testing.T) (*Store, *fakeDisks) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root to mount")
	}
	kinds, err := os.ReadFile("/proc/filesystems")
	require.NoError(t, err)
	for _, kind := range []string{"erofs", "overlay"} {
		if !strings.Contains(string(kinds), "\t"+kind+"\n") {
			t.Skipf("this machine's kernel has no %s", kind)
		}
	}
	root := filepath.Join(t.TempDir(), "store")
	s, err := New(root)
	require.NoError(t, err)
	disks := &fakeDisks{files: map[string]string{}}
	s.newDisks = func() (diskFinder, error) { return disks, nil }
	t.Cleanup(func() {
		require.Empty(t, s.containers)
		require.Empty(t, s.images)
		require.Empty(t, s.diskUsers)
		require.Empty(t, below(t, root, "c"), "directories of containers are left")
		require.Empty(t, below(t, root, "layers"), "directories of layers are left")
		_ = unix.Unmount(s.shmPath(), 0)
		for _, sc := range s.scratch {
			require.NoError(t, unmount(sc.path, 0)) // no mount: it was on the scratch disk
		}
		require.NoError(t, unix.Unmount(root, 0), "mounts are left")
	})
	return s, disks
}

func below(t *testing.T, root, dir string) (names []string) {
	entries, err := os.ReadDir(filepath.Join(root, dir))
	require.NoError(t, err)
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}
