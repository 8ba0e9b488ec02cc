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

	"github.com/containerd/errdefs"
	"github.com/erofs/go-erofs"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	agentv1 "github.com/cloister-project/cloister/agent-protocol/v1"
	"github.com/cloister-project/cloister/agent-protocol/wire"
	"github.com/cloister-project/cloister/internal/idmap"
)

func layers(serials ...string) *agentv1.Rootfs {
	r := &agentv1.Rootfs{}
	for _, serial := range serials {
		r.Layers = append(r.Layers, &agentv1.Layer{Serial: serial, Filesystem: "erofs"})
	}
	return r
}

func read(t *testing.T, elements ...string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(elements...))
	require.NoError(t, err)
	return string(text)
}

func TestRootfs(t *testing.T) {
	s, disks := newStore(t)
	disks.add(t, "base", map[string]string{"etc/a": "base", "etc/b": "base"})
	disks.add(t, "top", map[string]string{"etc/a": "top"})
	ctx := t.Context()

	one, err := s.MountRootfs(ctx, "one", layers("top", "base"), false, idmap.Map{})
	require.NoError(t, err)
	two, err := s.MountRootfs(ctx, "two", layers("base"), true, idmap.Map{})
	require.NoError(t, err)
	require.Equal(t, 2, disks.found, "a layer is mounted once")
	require.Equal(t, "top", read(t, one, "etc/a"))
	require.Equal(t, "base", read(t, one, "etc/b"))
	info, err := os.Stat(one)
	require.NoError(t, err)
	require.Equal(t, os.FileMode(0o751), info.Mode().Perm(), "the root directory is the image's")

	// Writes stay in the container; mount points can be made in a read-only one too.
	require.NoError(t, os.WriteFile(filepath.Join(one, "etc/a"), []byte("changed"), 0o644))
	require.NoError(t, os.Mkdir(filepath.Join(two, "mountpoint"), 0o755))
	require.Equal(t, "base", read(t, two, "etc/a"))

	_, err = s.MountRootfs(ctx, "one", layers("base"), false, idmap.Map{})
	require.ErrorIs(t, err, errdefs.ErrAlreadyExists)

	released, err := s.Remove(ctx, "one")
	require.NoError(t, err)
	require.Equal(t, []string{"top"}, released, "base is still in use")
	released, err = s.Remove(ctx, "two")
	require.NoError(t, err)
	require.Equal(t, []string{"base"}, released)
	released, err = s.Remove(ctx, "two")
	require.NoError(t, err)
	require.Empty(t, released)
}

func TestRootfsOfUserNamespace(t *testing.T) {
	s, disks := newStore(t)
	disks.add(t, "base", map[string]string{"etc/a": "base", "etc/b": "base"})
	disks.add(t, "top", map[string]string{"etc/c": "top"})
	ctx := t.Context()
	r := layers("top", "base")
	r.Layers[1].IdMapped = true
	_, err := s.MountRootfs(ctx, "c", r, false, idmap.Map{})
	require.ErrorIs(t, err, errdefs.ErrInvalidArgument, "the container has no user namespace")
	_, err = s.MountRootfs(ctx, "c", r, false, idmap.Map{UIDs: "0:1:x", GIDs: "0:1:1"})
	require.ErrorIs(t, err, errdefs.ErrInvalidArgument)

	owner := func(path ...string) [2]uint32 {
		var st unix.Stat_t
		require.NoError(t, unix.Lstat(filepath.Join(path...), &st))
		return [2]uint32{st.Uid, st.Gid}
	}
	ids := idmap.Map{UIDs: "0:1000:65536", GIDs: "0:2000:65536"}
	root, err := s.MountRootfs(ctx, "c", r, false, ids)
	require.NoError(t, err)
	require.Equal(t, [2]uint32{1000, 2000}, owner(root, "etc/a"))
	require.Equal(t, [2]uint32{0, 0}, owner(root, "etc/c"), "this layer was not to be mapped")
	// What is copied up keeps its owner.
	require.NoError(t, os.Chmod(filepath.Join(root, "etc/a"), 0o600))
	require.Equal(t, [2]uint32{1000, 2000}, owner(root, "etc/a"))

	r.Layers[0].IdMapped = true
	both, err := s.MountRootfs(ctx, "both", r, false, ids)
	require.NoError(t, err)
	require.Equal(t, [2]uint32{1000, 2000}, owner(both))
	// Others see the layer as it is.
	plain, err := s.MountRootfs(ctx, "plain", layers("base"), false, idmap.Map{})
	require.NoError(t, err)
	require.Equal(t, [2]uint32{0, 0}, owner(plain, "etc/a"))
	require.Equal(t, 2, disks.found, "a layer is mounted from its disk once")
	for _, id := range []string{"c", "both", "plain"} {
		_, err := s.Remove(ctx, id)
		require.NoError(t, err)
	}
}

func TestRootfsWithoutLayers(t *testing.T) {
	s, _ := newStore(t)
	path, err := s.MountRootfs(t.Context(), "c", &agentv1.Rootfs{WritableBytes: 1 << 20}, false, idmap.Map{})
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(filepath.Join(path, "x"), make([]byte, 1<<19), 0o644))
	require.ErrorIs(t, os.WriteFile(filepath.Join(path, "y"), make([]byte, 1<<20), 0o644), unix.ENOSPC, "writable_bytes is a limit")
	_, err = s.Remove(t.Context(), "c")
	require.NoError(t, err)
}

func TestWritableLayerHasALimit(t *testing.T) {
	s, disks := newStore(t)
	disks.add(t, "base", map[string]string{"a": "a"})
	r := layers("base")
	r.WritableBytes = 1 << 20
	path, err := s.MountRootfs(t.Context(), "c", r, false, idmap.Map{})
	require.NoError(t, err)
	require.ErrorIs(t, os.WriteFile(filepath.Join(path, "y"), make([]byte, 2<<20), 0o644), unix.ENOSPC)
	_, err = s.Remove(t.Context(), "c")
	require.NoError(t, err)
}

func TestManyLayers(t *testing.T) {
	s, disks := newStore(t)
	var serials []string
	for i := range 200 {
		serial := fmt.Sprintf("layer%d", i)
		disks.add(t, serial, map[string]string{serial: serial, "all": serial})
		serials = append(serials, serial)
	}
	path, err := s.MountRootfs(t.Context(), "c", layers(serials...), false, idmap.Map{})
	require.NoError(t, err)
	require.Equal(t, "layer0", read(t, path, "all"), "the first layer is the topmost")
	require.Equal(t, "layer199", read(t, path, "layer199"))
	released, err := s.Remove(t.Context(), "c")
	require.NoError(t, err)
	require.ElementsMatch(t, serials, released)
}

func TestFailureLeavesNothing(t *testing.T) {
	s, disks := newStore(t)
	disks.add(t, "base", map[string]string{"a": "a"})
	disks.files["rubbish"] = filepath.Join(t.TempDir(), "rubbish")
	require.NoError(t, os.WriteFile(disks.files["rubbish"], make([]byte, 1<<16), 0o600))

	_, err := s.MountRootfs(t.Context(), "c", layers("base", "missing"), false, idmap.Map{})
	require.ErrorIs(t, err, context.DeadlineExceeded)
	require.ErrorContains(t, err, "missing")
	require.ErrorContains(t, err, "layer 2 of 2")

	_, err = s.MountRootfs(t.Context(), "c", layers("base", "rubbish"), false, idmap.Map{})
	var mountErr *MountError
	require.ErrorAs(t, err, &mountErr)
	require.Equal(t, "erofs", mountErr.Type)
	require.ErrorIs(t, err, unix.EINVAL)
	require.ErrorContains(t, err, disks.files["rubbish"])
	t.Log(err)

	path, err := s.MountRootfs(t.Context(), "c", layers("base"), false, idmap.Map{})
	require.NoError(t, err)
	require.Equal(t, "a", read(t, path, "a"))
	_, err = s.Remove(t.Context(), "c")
	require.NoError(t, err)
}

func TestRemoveOfBusyCanBeRepeated(t *testing.T) {
	s, disks := newStore(t)
	disks.add(t, "base", map[string]string{"a": "a"})
	path, err := s.MountRootfs(t.Context(), "c", layers("base"), false, idmap.Map{})
	require.NoError(t, err)
	f, err := os.Open(filepath.Join(path, "a"))
	require.NoError(t, err)
	_, err = s.Remove(t.Context(), "c")
	require.ErrorIs(t, err, unix.EBUSY)
	require.NoError(t, f.Close())
	released, err := s.Remove(t.Context(), "c")
	require.NoError(t, err)
	require.Equal(t, []string{"base"}, released)
}

func TestConcurrentUse(t *testing.T) {
	s, disks := newStore(t)
	disks.add(t, "base", map[string]string{"a": "a"})
	disks.add(t, "top", map[string]string{"b": "b"})
	var wg sync.WaitGroup
	var mu sync.Mutex
	released := map[string]int{}
	for i := range 16 {
		wg.Go(func() {
			id := fmt.Sprintf("c%d", i)
			for range 5 {
				path, err := s.MountRootfs(t.Context(), id, layers("top", "base"), false, idmap.Map{})
				if err != nil {
					t.Error(err)
					return
				}
				if _, err := os.Stat(filepath.Join(path, "a")); err != nil {
					t.Error(err)
				}
				serials, err := s.Remove(t.Context(), id)
				if err != nil {
					t.Error(err)
				}
				mu.Lock()
				for _, serial := range serials {
					released[serial]++
				}
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	require.NotZero(t, released["base"])
}

func TestRootfsRefusals(t *testing.T) {
	s, _ := newStore(t)
	tooMany := make([]string, wire.MaxLayers+1)
	for i := range tooMany {
		tooMany[i] = fmt.Sprint(i)
	}
	ext4 := layers("a")
	ext4.Layers[0].Filesystem = "ext4"
	double := layers("a")
	double.Layers[0].ExtraSerials = []string{"b", "b"}
	for name, tc := range map[string]struct {
		id string
		r  *agentv1.Rootfs
	}{
		"layers":  {"c", layers(tooMany...)},
		"twice":   {"c", layers("a", "a")},
		"serial":  {"c", layers("../a")},
		"empty":   {"c", layers("")},
		"long":    {"c", layers("a23456789012345678901")},
		"type":    {"c", ext4},
		"devices": {"c", double},
		"id":      {"../c", layers("a")},
		"no id":   {"", layers("a")},
	} {
		_, err := s.MountRootfs(t.Context(), tc.id, tc.r, false, idmap.Map{})
		require.ErrorIs(t, err, errdefs.ErrInvalidArgument, name)
	}
}

func TestGate(t *testing.T) {
	s, _ := newStore(t)
	s.After(func(context.Context) error { return errdefs.ErrUnavailable })
	_, err := s.MountRootfs(t.Context(), "c", &agentv1.Rootfs{}, false, idmap.Map{})
	require.ErrorIs(t, err, errdefs.ErrUnavailable)
}

func TestFurtherDisks(t *testing.T) {
	s, disks := newStore(t)
	// An image whose files' content is on a second disk.
	dir := t.TempDir()
	for _, name := range []string{"meta", "data"} {
		disks.files[name] = filepath.Join(dir, name)
	}
	meta, err := os.Create(disks.files["meta"])
	require.NoError(t, err)
	data, err := os.Create(disks.files["data"])
	require.NoError(t, err)
	w := erofs.Create(meta, erofs.WithDataFile(data))
	f, err := w.Create("/file")
	require.NoError(t, err)
	content := strings.Repeat("0123456789abcdef", 1000)
	_, err = f.Write([]byte(content))
	require.NoError(t, err)
	require.NoError(t, f.Close())
	require.NoError(t, w.Close())
	require.NoError(t, meta.Close())
	require.NoError(t, data.Close())

	r := layers("meta")
	r.Layers[0].ExtraSerials = []string{"data"}
	path, err := s.MountRootfs(t.Context(), "c", r, false, idmap.Map{})
	require.NoError(t, err)
	require.Equal(t, content, read(t, path, "file"))

	_, err = s.MountRootfs(t.Context(), "other", layers("meta"), false, idmap.Map{})
	require.ErrorIs(t, err, errdefs.ErrInvalidArgument, "the same image with other disks")
	require.ErrorContains(t, err, "data")

	released, err := s.Remove(t.Context(), "c")
	require.NoError(t, err)
	require.ElementsMatch(t, []string{"meta", "data"}, released)
}
