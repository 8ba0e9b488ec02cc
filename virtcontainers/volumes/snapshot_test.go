// SPDX-License-Identifier: Apache-2.0

package volumes

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/cloister-project/cloister/agent-protocol/wire"
)

// atomicVolume is a volume in the layout of the kubelet's AtomicWriter.
type atomicVolume struct {
	t   testing.TB
	dir string
	n   int
}

func newAtomicVolume(t testing.TB, files map[string]string) *atomicVolume {
	v := &atomicVolume{t: t, dir: filepath.Join(t.TempDir(), "volume")}
	require.NoError(t, os.Mkdir(v.dir, 0o755))
	v.update(files)
	return v
}

// current is the directory that the next update makes or the last one made.
func (v *atomicVolume) current() string { return fmt.Sprintf("..2026_01_02_03_04_05.%09d", v.n) }

// update does what the kubelet does: a new directory, the link's rename, the old directory's end.
func (v *atomicVolume) update(files map[string]string) {
	old := filepath.Join(v.dir, v.current())
	v.n++
	for name, content := range files {
		path := filepath.Join(v.dir, v.current(), name)
		require.NoError(v.t, os.MkdirAll(filepath.Dir(path), 0o755))
		require.NoError(v.t, os.WriteFile(path, []byte(content), 0o640))
		top, _, _ := strings.Cut(name, "/")
		if err := os.Symlink("..data/"+top, filepath.Join(v.dir, top)); err != nil {
			require.ErrorIs(v.t, err, os.ErrExist)
		}
	}
	require.NoError(v.t, os.MkdirAll(filepath.Join(v.dir, v.current()), 0o755))
	tmp := filepath.Join(v.dir, "..data_tmp")
	require.NoError(v.t, os.Symlink(v.current(), tmp))
	require.NoError(v.t, os.Rename(tmp, filepath.Join(v.dir, dataLink)))
	require.NoError(v.t, os.RemoveAll(old))
}

// inside is a path in the current directory.
func (v *atomicVolume) inside(name string) string { return filepath.Join(v.dir, v.current(), name) }

func contents(s *Snapshot) map[string]string {
	m := map[string]string{}
	for _, f := range s.Files {
		m[f.Path] = string(f.Content)
	}
	return m
}

func TestReadAtomicVolume(t *testing.T) {
	v := newAtomicVolume(t, map[string]string{"b": "2", "a": "1", "sub/deep/c": "3", "empty": "", ".hidden": "h"})
	require.NoError(t, os.Chmod(v.inside("a"), 0o400|os.ModeSetuid))
	s, err := Read(t.Context(), v.dir)
	require.NoError(t, err)
	require.Equal(t, v.current(), s.Version)
	require.Equal(t, map[string]string{"b": "2", "a": "1", "sub/deep/c": "3", "empty": "", ".hidden": "h"}, contents(s))
	require.IsIncreasing(t, []string{s.Files[0].Path, s.Files[1].Path, s.Files[2].Path, s.Files[3].Path, s.Files[4].Path})
	require.EqualValues(t, 0o400, s.Files[1].Mode, "permission bits only")
	require.EqualValues(t, os.Getuid(), s.Files[1].UID)
	require.EqualValues(t, os.Getgid(), s.Files[1].GID)

	v.update(map[string]string{"a": "new"})
	s, err = Read(t.Context(), v.dir)
	require.NoError(t, err)
	require.Equal(t, map[string]string{"a": "new"}, contents(s), "what the update removed is gone, though links to it are left")
}

func TestReadDirectoryWithoutLink(t *testing.T) {
	dir := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(dir, "f"), []byte("x"), 0o600))
	require.NoError(t, os.Mkdir(filepath.Join(dir, "..2026"), 0o700))
	s, err := Read(t.Context(), dir)
	require.NoError(t, err)
	require.Empty(t, s.Version)
	require.Equal(t, map[string]string{"f": "x"}, contents(s))
}

func TestReadRefuses(t *testing.T) {
	for _, tc := range []struct {
		name string
		make func(t *testing.T, v *atomicVolume)
		kind error
		want string
	}{
		{"pipe", func(t *testing.T, v *atomicVolume) { require.NoError(t, unix.Mkfifo(v.inside("p"), 0o600)) },
			errdefs.ErrInvalidArgument, "p is neither a file nor a directory"},
		{"link that escapes", func(t *testing.T, v *atomicVolume) { require.NoError(t, os.Symlink("/etc/passwd", v.inside("l"))) },
			errdefs.ErrInvalidArgument, "l is neither"},
		{"link within", func(t *testing.T, v *atomicVolume) { require.NoError(t, os.Symlink("a", v.inside("l"))) },
			errdefs.ErrInvalidArgument, "l is neither"},
		{"linked directory", func(t *testing.T, v *atomicVolume) {
			require.NoError(t, os.Mkdir(v.inside("d"), 0o755))
			require.NoError(t, os.Symlink("/etc", v.inside("d/l")))
		}, errdefs.ErrInvalidArgument, "d/l is neither"},
		{"data link out of the volume", func(t *testing.T, v *atomicVolume) {
			require.NoError(t, os.Remove(filepath.Join(v.dir, dataLink)))
			require.NoError(t, os.Symlink("../../etc", filepath.Join(v.dir, dataLink)))
		}, errdefs.ErrInvalidArgument, "no directory of the volume"},
		{"data link to the parent", func(t *testing.T, v *atomicVolume) {
			require.NoError(t, os.Remove(filepath.Join(v.dir, dataLink)))
			require.NoError(t, os.Symlink("..", filepath.Join(v.dir, dataLink)))
		}, errdefs.ErrInvalidArgument, "no directory of the volume"},
		{"data link to a link", func(t *testing.T, v *atomicVolume) {
			require.NoError(t, os.RemoveAll(filepath.Join(v.dir, v.current())))
			require.NoError(t, os.Symlink("/etc", filepath.Join(v.dir, v.current())))
		}, unix.ENOTDIR, "its directory"},
		{"data link to nowhere", func(t *testing.T, v *atomicVolume) {
			require.NoError(t, os.RemoveAll(filepath.Join(v.dir, v.current())))
		}, errdefs.ErrUnavailable, "changed 10 times"},
		{"data is a directory", func(t *testing.T, v *atomicVolume) {
			require.NoError(t, os.Remove(filepath.Join(v.dir, dataLink)))
			require.NoError(t, os.Mkdir(filepath.Join(v.dir, dataLink), 0o755))
		}, unix.EINVAL, dataLink},
		{"name of the writer's own", func(t *testing.T, v *atomicVolume) {
			require.NoError(t, os.WriteFile(v.inside("..x"), nil, 0o600))
		}, errdefs.ErrInvalidArgument, "two dots"},
		{"too many files", func(t *testing.T, v *atomicVolume) {
			for i := range wire.MaxVolumeFiles {
				require.NoError(t, os.WriteFile(v.inside(fmt.Sprint("f", i)), nil, 0o600))
			}
		}, errdefs.ErrResourceExhausted, "more than 1024 files"},
		{"too deep", func(t *testing.T, v *atomicVolume) {
			require.NoError(t, os.MkdirAll(v.inside(strings.Repeat("d/", maxDepth+1)), 0o755))
		}, errdefs.ErrResourceExhausted, "directories deep"},
		{"long path", func(t *testing.T, v *atomicVolume) {
			require.NoError(t, os.MkdirAll(v.inside(strings.Repeat(strings.Repeat("d", 200)+"/", 3)), 0o755))
		}, errdefs.ErrResourceExhausted, "the limit is 512"},
		{"one file too big", func(t *testing.T, v *atomicVolume) {
			require.NoError(t, os.Truncate(v.inside("a"), wire.MaxVolumeBytes+1))
		}, errdefs.ErrResourceExhausted, "more than 8388608 bytes"},
		{"together too big", func(t *testing.T, v *atomicVolume) {
			require.NoError(t, os.Truncate(v.inside("a"), wire.MaxVolumeBytes))
			require.NoError(t, os.WriteFile(v.inside("b"), []byte("x"), 0o600))
		}, errdefs.ErrResourceExhausted, "more than 8388608 bytes"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			v := newAtomicVolume(t, map[string]string{"a": "1"})
			tc.make(t, v)
			_, err := Read(t.Context(), v.dir)
			require.ErrorIs(t, err, tc.kind)
			require.ErrorContains(t, err, tc.want)
			require.ErrorContains(t, err, v.dir)
		})
	}
}

func TestReadTakesWhatIsAtTheLimit(t *testing.T) {
	v := newAtomicVolume(t, map[string]string{"a": "1"})
	require.NoError(t, os.Truncate(v.inside("a"), wire.MaxVolumeBytes))
	for i := range wire.MaxVolumeFiles - 1 {
		require.NoError(t, os.WriteFile(v.inside(fmt.Sprint("f", i)), nil, 0o600))
	}
	s, err := Read(t.Context(), v.dir)
	require.NoError(t, err)
	require.Len(t, s.Files, wire.MaxVolumeFiles)
}

func TestReadNeverMixesTwoUpdates(t *testing.T) {
	v := newAtomicVolume(t, map[string]string{"a": "old", "b": "old"})
	steps := 0
	s, err := read(t.Context(), v.dir, func() {
		if steps++; steps == 1 {
			v.update(map[string]string{"a": "new", "b": "new"})
		}
	})
	require.NoError(t, err)
	require.Equal(t, map[string]string{"a": "new", "b": "new"}, contents(s))
	require.Equal(t, v.current(), s.Version)

	_, err = read(t.Context(), v.dir, func() { v.update(map[string]string{"a": fmt.Sprint(v.n)}) })
	require.ErrorIs(t, err, errdefs.ErrUnavailable, "a volume that never rests")
}

func TestReadFileThatVanishes(t *testing.T) {
	v := newAtomicVolume(t, map[string]string{"a": "1", "b": "2", "c": "3"})
	done := false
	s, err := read(t.Context(), v.dir, func() {
		for _, name := range []string{"a", "b", "c"} {
			if !done {
				require.NoError(t, os.Remove(v.inside(name)))
			}
		}
		done = true
	})
	require.NoError(t, err)
	require.Empty(t, s.Files, "read anew after a name was found whose file was gone")
	_, err = Read(t.Context(), filepath.Join(v.dir, "nowhere"))
	require.ErrorIs(t, err, os.ErrNotExist)
}

func TestReadDoesNotCrossMounts(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("mounting needs root")
	}
	v := newAtomicVolume(t, map[string]string{"d/f": "1"})
	require.NoError(t, unix.Mount("none", v.inside("d"), "tmpfs", 0, "size=64k"))
	t.Cleanup(func() { _ = unix.Unmount(v.inside("d"), unix.MNT_DETACH) })
	_, err := Read(t.Context(), v.dir)
	require.ErrorIs(t, err, unix.EXDEV)
}
