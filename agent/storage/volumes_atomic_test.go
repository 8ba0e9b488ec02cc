// SPDX-License-Identifier: Apache-2.0

package storage

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	agentv1 "github.com/cloister-project/cloister/agent-protocol/v1"
)

// generationFile is content that tells its generation in each line.
func generationFile(path string, generation, lines int) *agentv1.VolumeFile {
	return part(path, strings.Repeat(strconv.Itoa(generation)+"\n", lines))
}

// generationOf reads such content.
func generationOf(raw []byte, lines int) (int, error) {
	first, _, _ := bytes.Cut(raw, []byte("\n"))
	generation, err := strconv.Atoi(string(first))
	if err != nil || !bytes.Equal(raw, bytes.Repeat(append(first, '\n'), lines)) {
		return 0, fmt.Errorf("%d bytes, not all of one generation: %.20q...", len(raw), raw)
	}
	return generation, nil
}

// TestVolumeReaders reads a volume while it changes: each file is whole, and a reader that has seen a generation never
// sees an older one, whichever file it looks at. A lookup that has read ..data when it changes may find the old directory
// gone, as with the kubelet's AtomicWriter; the next one finds the file.
func TestVolumeReaders(t *testing.T) {
	const generations, lines = 200, 5000
	s := volumeStore(t)
	put := func(generation int) {
		t.Helper()
		putVolume(t, s, putRequest(uint64(generation), false, generationFile("a", generation, lines), part("only-"+strconv.Itoa(generation), "")))
		putVolume(t, s, putRequest(uint64(generation), true, generationFile("d/b", generation, lines)))
	}
	put(1)
	dir := volumeDirectory(t, s)
	ctx, end := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	for range 2 {
		wg.Go(func() { readByPath(ctx, t, dir, lines) })
	}
	wg.Go(func() { readByDirectory(ctx, t, dir, lines) })
	for generation := 2; generation <= generations && !t.Failed(); generation++ {
		put(generation)
	}
	end()
	wg.Wait()
	if !t.Failed() {
		require.Len(t, content(t, dir), 3)
	}
}

func readByPath(ctx context.Context, t *testing.T, dir string, lines int) {
	seen := 0
	for ctx.Err() == nil {
		for _, name := range []string{"a", "d/b"} {
			raw, err := os.ReadFile(filepath.Join(dir, name))
			if errors.Is(err, os.ErrNotExist) {
				raw, err = os.ReadFile(filepath.Join(dir, name))
			}
			if err != nil {
				t.Errorf("after generation %d: %v", seen, err)
				return
			}
			generation, err := generationOf(raw, lines)
			if err != nil || generation < seen {
				t.Errorf("%s: generation %d after %d: %v", name, generation, seen, err)
				return
			}
			seen = generation
		}
	}
}

// readByDirectory opens ..data once for several files, as careful programs do. They are of one generation, or gone with it.
func readByDirectory(ctx context.Context, t *testing.T, dir string, lines int) {
	for ctx.Err() == nil {
		directory, err := os.OpenRoot(filepath.Join(dir, "..data"))
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			t.Errorf("..data: %v", err)
			return
		}
		var seen []int
		for _, name := range []string{"a", "d/b", "a"} {
			raw, err := directory.ReadFile(name)
			if errors.Is(err, os.ErrNotExist) {
				break
			}
			generation, err := generationOf(raw, lines)
			if err != nil {
				t.Errorf("%s: %v", name, err)
			}
			seen = append(seen, generation)
		}
		_ = directory.Close()
		for _, generation := range seen {
			if generation != seen[0] {
				t.Errorf("one directory has the generations %v", seen)
				return
			}
		}
	}
}

// limitStore sets a limit of the Store's file system.
func limitStore(t *testing.T, s *Store, option string, value uint64) {
	t.Helper()
	data := fmt.Sprintf("%s=%d", option, value)
	require.NoError(t, unix.Mount("", s.root, "", unix.MS_REMOUNT|unix.MS_NOSUID|unix.MS_NODEV, data), data)
}

func usage(t *testing.T, s *Store) (bytes, inodes uint64) {
	t.Helper()
	var stat unix.Statfs_t
	require.NoError(t, unix.Statfs(s.root, &stat))
	return (stat.Blocks - stat.Bfree) * uint64(stat.Bsize), stat.Files - stat.Ffree
}

// TestVolumeWithoutMemory lets memory run out at every step of an update: what containers see stays as it was, and the
// next generation finds all memory free again.
func TestVolumeWithoutMemory(t *testing.T) {
	s := volumeStore(t)
	old := map[string]string{"a": "old", "d/b": "old", "going": "old"}
	putVolume(t, s, putRequest(1, true, part("a", "old"), part("d/b", "old"), part("going", "old")))
	dir := volumeDirectory(t, s)
	generation := uint64(1)
	failures := 0
	for _, limit := range []struct {
		option string
		step   uint64
	}{{"size", uint64(os.Getpagesize())}, {"nr_inodes", 1}} {
		for spare := uint64(0); ; spare += limit.step {
			bytesBefore, inodesBefore := usage(t, s)
			used := bytesBefore
			if limit.option == "nr_inodes" {
				used = inodesBefore
			}
			limitStore(t, s, limit.option, used+spare)
			generation++
			// More new names than the old generation has files, so that its going does not make room for them.
			files := append(manyFiles(8, "new-%d"), part("a", strings.Repeat("new", 10_000)), part("d/b", "new"), part("e/f/g", "new"))
			err := s.PutVolume(t.Context(), putRequest(generation, true, files...))
			if err == nil {
				require.Len(t, content(t, dir), len(files))
				break
			}
			failures++
			require.ErrorIs(t, err, unix.ENOSPC)
			require.ErrorIs(t, err, errdefs.ErrResourceExhausted)
			require.Equal(t, old, content(t, dir), "%s with %d to spare: %v", limit.option, spare, err)
			require.Len(t, hidden(t, dir), 2)
			bytesAfter, inodesAfter := usage(t, s)
			require.Equal(t, [2]uint64{bytesBefore, inodesBefore}, [2]uint64{bytesAfter, inodesAfter}, "%s with %d to spare: %v", limit.option,
				spare, err)
			require.ErrorIs(t, s.PutVolume(t.Context(), putRequest(generation, true)), errdefs.ErrFailedPrecondition,
				"a generation that failed stays so")
		}
		limitStore(t, s, limit.option, 1<<30)
		generation++
		putVolume(t, s, putRequest(generation, true, part("a", "old"), part("d/b", "old"), part("going", "old")))
		require.Equal(t, old, content(t, dir))
	}
	// Pages of the files; inodes of the generation, its three directories, eleven files and nine new names.
	require.Greater(t, failures, 24)
}
