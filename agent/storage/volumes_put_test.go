// SPDX-License-Identifier: Apache-2.0

package storage

import (
	"context"
	"fmt"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	agentv1 "github.com/cloister-project/cloister/agent-protocol/v1"
	"github.com/cloister-project/cloister/agent-protocol/wire"
)

// volumeStore makes a Store that goes with all its mounts in the end. It needs no file system but tmpfs.
func volumeStore(t testing.TB) *Store {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root to mount")
	}
	root := filepath.Join(t.TempDir(), "store")
	s, err := New(root)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, unix.Unmount(root, unix.MNT_DETACH)) })
	return s
}

// part is a whole file, or the beginning of one.
func part(path, content string) *agentv1.VolumeFile {
	return &agentv1.VolumeFile{Path: path, Mode: 0o644, Content: []byte(content)}
}

// further is another part of a file.
func further(path string, offset uint64, content string) *agentv1.VolumeFile {
	return &agentv1.VolumeFile{Path: path, Offset: offset, Content: []byte(content)}
}

func putRequest(generation uint64, commit bool, files ...*agentv1.VolumeFile) *agentv1.PutVolumeRequest {
	return &agentv1.PutVolumeRequest{Name: "v", Generation: generation, Files: files, Commit: commit}
}

func putVolume(t testing.TB, s *Store, r *agentv1.PutVolumeRequest) {
	t.Helper()
	require.NoError(t, s.PutVolume(context.Background(), r))
}

func volumeMount(name, path string, options ...string) *agentv1.Mount {
	return &agentv1.Mount{Destination: "/v", Options: options, Source: &agentv1.Mount_Volume{Volume: &agentv1.PodVolume{Name: name,
		Path: path}}}
}

// volumeDirectory is where a container would see volume v.
func volumeDirectory(t testing.TB, s *Store) string {
	t.Helper()
	got, err := s.PrepareMounts(context.Background(), "looks", []*agentv1.Mount{volumeMount("v", "")})
	require.NoError(t, err)
	_, err = s.Remove(context.Background(), "looks")
	require.NoError(t, err)
	return got[0].Source
}

// content reads a volume as a container does: all files that its names lead to.
func content(t testing.TB, dir string) map[string]string {
	t.Helper()
	out := map[string]string{}
	entries, err := os.ReadDir(dir)
	require.NoError(t, err)
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), "..") {
			continue
		}
		link, err := os.Readlink(filepath.Join(dir, e.Name()))
		require.NoError(t, err)
		require.Equal(t, "..data/"+e.Name(), link)
		top, err := filepath.EvalSymlinks(filepath.Join(dir, e.Name()))
		require.NoError(t, err, "a name that leads nowhere")
		require.NoError(t, filepath.WalkDir(top, func(path string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() {
				return err
			}
			raw, err := os.ReadFile(path)
			rel, _ := filepath.Rel(top, path)
			out[filepath.Join(e.Name(), rel)] = string(raw)
			return err
		}))
	}
	return out
}

// hidden lists the layout's own names in a volume's directory.
func hidden(t testing.TB, dir string) (names []string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	require.NoError(t, err)
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), "..") {
			names = append(names, e.Name())
		}
	}
	return names
}

func TestVolumeGenerations(t *testing.T) {
	s := volumeStore(t)
	putVolume(t, s, putRequest(1, true, part("a", "1"), part("d/e/f", "1"), part("d/g", ""), part("dropped", "1")))
	dir := volumeDirectory(t, s)
	require.Equal(t, map[string]string{"a": "1", "d/e/f": "1", "d/g": "", "dropped": "1"}, content(t, dir))
	require.Len(t, hidden(t, dir), 2, "..data and one generation")
	first, err := os.Readlink(filepath.Join(dir, "..data"))
	require.NoError(t, err)
	require.NotContains(t, first, "/")

	// Unfinished, and then with parts: nothing of it shows before the commit.
	putVolume(t, s, putRequest(3, false, part("a", "ab"), part("new", "n")))
	putVolume(t, s, putRequest(3, false, further("a", 2, "cd"), further("a", 4, "ef")))
	require.Equal(t, map[string]string{"a": "1", "d/e/f": "1", "d/g": "", "dropped": "1"}, content(t, dir))
	putVolume(t, s, putRequest(3, true, further("a", 6, "g"), part("d", "a file now")))
	require.Equal(t, map[string]string{"a": "abcdefg", "d": "a file now", "new": "n"}, content(t, dir))
	require.Len(t, hidden(t, dir), 2, "the old generation is gone")
	second, err := os.Readlink(filepath.Join(dir, "..data"))
	require.NoError(t, err)
	require.NotEqual(t, first, second)

	// A greater one drops the unfinished one.
	putVolume(t, s, putRequest(4, false, part("big", strings.Repeat("x", 1000))))
	require.Len(t, hidden(t, dir), 3)
	putVolume(t, s, putRequest(math.MaxUint64, true))
	require.Empty(t, content(t, dir))
	require.Len(t, hidden(t, dir), 2)
	for _, generation := range []uint64{0, 1, 3, 4, 5, math.MaxUint64} {
		require.Error(t, s.PutVolume(t.Context(), putRequest(generation, true, part("a", "x"))), generation)
	}
	require.ErrorIs(t, s.PutVolume(t.Context(), putRequest(5, true)), errdefs.ErrFailedPrecondition)
	require.ErrorIs(t, s.PutVolume(t.Context(), putRequest(math.MaxUint64, true)), errdefs.ErrFailedPrecondition)
	require.Empty(t, content(t, dir))
}

func TestVolumeOfNothing(t *testing.T) {
	s := volumeStore(t)
	putVolume(t, s, putRequest(1, false))
	_, err := s.PrepareMounts(t.Context(), "c", []*agentv1.Mount{volumeMount("v", "")})
	require.ErrorIs(t, err, errdefs.ErrFailedPrecondition, "it is not complete")
	putVolume(t, s, putRequest(1, true))
	dir := volumeDirectory(t, s)
	require.Empty(t, content(t, dir))
	require.Empty(t, below(t, dir, "..data"))
}

func TestVolumeModes(t *testing.T) {
	s := volumeStore(t)
	putVolume(t, s, putRequest(1, true,
		&agentv1.VolumeFile{Path: "suid", Mode: 0o106755, Uid: 7, Gid: 8, Content: []byte("x")},
		&agentv1.VolumeFile{Path: "none"}, &agentv1.VolumeFile{Path: "d/x", Mode: 0o777}))
	dir := volumeDirectory(t, s)
	for name, want := range map[string]os.FileMode{
		"suid": 0o755, "none": 0, "d/x": 0o777, "d": os.ModeDir | 0o755, "..data": os.ModeDir | 0o755, ".": os.ModeDir | 0o755,
	} {
		info, err := os.Stat(filepath.Join(dir, name))
		require.NoError(t, err)
		require.Equal(t, want, info.Mode(), name)
	}
	info, err := os.Stat(filepath.Join(dir, "suid"))
	require.NoError(t, err)
	require.Equal(t, [2]uint32{7, 8}, [2]uint32{info.Sys().(*syscall.Stat_t).Uid, info.Sys().(*syscall.Stat_t).Gid})
}

func TestVolumeRefusals(t *testing.T) {
	s := volumeStore(t)
	putVolume(t, s, putRequest(1, true, part("a", "old")))
	dir := volumeDirectory(t, s)
	long := strings.Repeat("n", 255)
	paths := map[string]string{
		"empty": "", "dot": ".", "parent": "..", "up": "../x", "inside up": "a/../../x", "not clean": "a//b", "back": "a/../b",
		"slash": "a/", "absolute": "/etc/passwd", "dot element": "./a", "inner dot": "a/./b", "data link": "..data", "below it": "..data/x",
		"generation": "..1/x", "inner dots": "a/..b", "three dots": "...", "nul": "a\x00b", "only slash": "/",
		"long element": long + "n", "long": strings.Repeat("d/", wire.MaxVolumePath/2) + "x",
	}
	cases := map[string][]*agentv1.VolumeFile{
		"twice":               {part("x", "1"), part("x", "2")},
		"empty twice":         {part("x", ""), part("x", "")},
		"gap":                 {part("x", "1"), further("x", 2, "3")},
		"overlap":             {part("x", "12"), further("x", 1, "3")},
		"no beginning":        {further("x", 1, "3")},
		"huge offset":         {part("x", "1"), further("x", math.MaxUint64, "3")},
		"negative offset":     {further("x", 1<<63, "3")},
		"file then directory": {part("x", ""), part("x/y", "")},
		"deep":                {part("x", ""), part("x/y/z", "")},
		"directory then file": {part("x/y", ""), part("x", "")},
		"no uid":              {{Path: "x", Uid: math.MaxUint32}},
		"no gid":              {{Path: "x", Gid: math.MaxUint32}},
		"chunk":               {part("x", strings.Repeat("x", wire.MaxVolumeChunk)), part("y", "1")},
		"nil":                 {nil},
		"files":               manyFiles(wire.MaxVolumeFiles+1, "f%d"),
		// 255 directories each.
		"directories": manyFiles(5, strings.Repeat("%[1]d/", wire.MaxVolumePath/2-1)+"f"),
	}
	for name, p := range paths {
		cases["path: "+name] = []*agentv1.VolumeFile{part(p, "")}
	}
	generation := uint64(1)
	for name, files := range cases {
		t.Run(name, func(t *testing.T) {
			// Twice, so that a fault in the middle of a generation is one too.
			generation += 2
			err := s.PutVolume(t.Context(), putRequest(generation-1, true, files...))
			require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
			require.Less(t, len(err.Error()), 1024)
			putVolume(t, s, putRequest(generation, false, part("begun", "x")))
			require.ErrorIs(t, s.PutVolume(t.Context(), putRequest(generation, true, files...)), errdefs.ErrInvalidArgument)
			require.Equal(t, map[string]string{"a": "old"}, content(t, dir))
		})
	}
	generation++
	putVolume(t, s, putRequest(generation, true, part("a", "new")))
	require.Equal(t, map[string]string{"a": "new"}, content(t, dir))
	require.Len(t, hidden(t, dir), 2, "nothing of the refused ones is left")
}

func manyFiles(n int, format string) (files []*agentv1.VolumeFile) {
	for i := range n {
		files = append(files, part(fmt.Sprintf(format, i), ""))
	}
	return files
}

func TestVolumeNames(t *testing.T) {
	s := volumeStore(t)
	long := strings.Repeat("a", 64)
	for _, name := range []string{"", ".", "..", ".a", "a/b", "/", "A", "a_b", "ä", "a b", "a\x00", long + "a"} {
		err := s.PutVolume(t.Context(), &agentv1.PutVolumeRequest{Name: name, Generation: 1, Commit: true})
		require.ErrorIs(t, err, errdefs.ErrInvalidArgument, name)
		_, err = s.PrepareMounts(t.Context(), "c", []*agentv1.Mount{volumeMount(name, "")})
		require.ErrorIs(t, err, errdefs.ErrInvalidArgument, name)
	}
	for _, name := range []string{"a", "0", "-", "a..b", "kube-api-access-x7.1", long} {
		putVolume(t, s, &agentv1.PutVolumeRequest{Name: name, Generation: 1, Commit: true})
	}
	names := below(t, s.root, "volumes")
	require.Len(t, names, 6)
	for _, name := range names {
		require.Empty(t, strings.Trim(name, "0123456789"), "the guest chooses the directories")
	}
}

// TestVolumeLimits goes to each limit; TestVolumeRefusals goes beyond.
func TestVolumeLimits(t *testing.T) {
	s := volumeStore(t)
	putVolume(t, s, putRequest(1, true, manyFiles(wire.MaxVolumeFiles, "f%d")...))
	dir := volumeDirectory(t, s)
	require.Len(t, content(t, dir), wire.MaxVolumeFiles)
	putVolume(t, s, putRequest(2, false, manyFiles(wire.MaxVolumeFiles, "f%d")...))
	require.ErrorIs(t, s.PutVolume(t.Context(), putRequest(2, true, part("more", ""))), errdefs.ErrInvalidArgument)

	longest := strings.Repeat("d", 255) + "/" + strings.Repeat("e", 254) + "/f"
	require.Len(t, longest, wire.MaxVolumePath)
	putVolume(t, s, putRequest(3, true, part(longest, "x")))
	require.Equal(t, map[string]string{longest: "x"}, content(t, dir))

	chunk := strings.Repeat("x", wire.MaxVolumeChunk)
	parts := wire.MaxVolumeBytes / wire.MaxVolumeChunk
	for i := range parts {
		f := part("big", chunk)
		if i > 0 {
			f = further("big", uint64(i)*wire.MaxVolumeChunk, chunk)
		}
		putVolume(t, s, putRequest(4, false, f))
	}
	putVolume(t, s, putRequest(4, true))
	require.Len(t, content(t, dir)["big"], wire.MaxVolumeBytes)
	for i := range parts {
		putVolume(t, s, putRequest(5, false, part(fmt.Sprint(i), chunk)))
	}
	require.ErrorIs(t, s.PutVolume(t.Context(), putRequest(5, true, part("more", "x"))), errdefs.ErrInvalidArgument)
	require.Len(t, content(t, dir)["big"], wire.MaxVolumeBytes)
	require.Len(t, hidden(t, dir), 2, "the memory of what was dropped is free")

	for i := range wire.MaxVolumes - 1 {
		putVolume(t, s, &agentv1.PutVolumeRequest{Name: fmt.Sprint(i), Generation: 1, Commit: true})
	}
	err := s.PutVolume(t.Context(), &agentv1.PutVolumeRequest{Name: "more", Generation: 1, Commit: true})
	require.ErrorIs(t, err, errdefs.ErrResourceExhausted)
	putVolume(t, s, putRequest(6, true, part("a", "those that are there go on")))
}

// TestVolumeIsNotLeft puts links and directories of a container that can write where the files go.
func TestVolumeIsNotLeft(t *testing.T) {
	s := volumeStore(t)
	outside := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(outside, "f"), []byte("outside"), 0o600))
	putVolume(t, s, putRequest(1, true, part("a", "old")))
	dir := volumeDirectory(t, s)
	putVolume(t, s, putRequest(2, false, part("d/x", "1"), part("f", "1")))
	var draft string
	shown, err := os.Readlink(filepath.Join(dir, "..data"))
	require.NoError(t, err)
	for _, name := range hidden(t, dir) {
		if name != "..data" && name != shown {
			draft = filepath.Join(dir, name)
		}
	}
	require.NoError(t, os.RemoveAll(filepath.Join(draft, "d")))
	require.NoError(t, os.Symlink(outside, filepath.Join(draft, "d")))
	require.NoError(t, os.Remove(filepath.Join(draft, "f")))
	require.NoError(t, os.Symlink(filepath.Join(outside, "f"), filepath.Join(draft, "f")))
	require.Error(t, s.PutVolume(t.Context(), putRequest(2, true, part("d/new", "x"), further("f", 1, "x"))))

	// Its removal does not follow them either.
	putVolume(t, s, putRequest(3, true, part("a", "new")))
	require.Equal(t, map[string]string{"a": "new"}, content(t, dir))
	left, err := os.ReadDir(outside)
	require.NoError(t, err)
	require.Len(t, left, 1)
	require.Equal(t, "outside", read(t, outside, "f"))
}

func TestVolumeConcurrency(t *testing.T) {
	s := volumeStore(t)
	var wg sync.WaitGroup
	for v := range 8 {
		for generation := range 20 {
			wg.Go(func() {
				name := fmt.Sprint("v", v%4)
				// Which of them come too late is chance; nothing else may go wrong.
				err := s.PutVolume(t.Context(), &agentv1.PutVolumeRequest{
					Name: name, Generation: uint64(1 + generation*8 + v), Commit: true,
					Files: []*agentv1.VolumeFile{part("a", fmt.Sprint(generation))},
				})
				if err != nil && !errdefs.IsFailedPrecondition(err) {
					t.Error(err)
				}
				container := fmt.Sprint("c", v, "-", generation)
				if _, err := s.PrepareMounts(t.Context(), container, []*agentv1.Mount{volumeMount(name, ""), volumeMount(name, "a"),
					scratchMount("s", 0, 0o755)}); err != nil {
					t.Error(err)
				}
				if _, err := s.Remove(t.Context(), container); err != nil {
					t.Error(err)
				}
			})
		}
	}
	wg.Wait()
	require.Len(t, below(t, s.root, "scratch"), 1)
}
