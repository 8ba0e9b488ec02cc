// SPDX-License-Identifier: Apache-2.0

package rootfs

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"
	erofs "github.com/erofs/go-erofs"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/cloister-project/cloister/virtcontainers/rootfs/erofsimg"
	"github.com/cloister-project/cloister/virtcontainers/rootfs/internal/treetest"
)

func TestMain(m *testing.M) {
	if os.Getenv(childEnv) != "" {
		child()
		return
	}
	goleak.VerifyTestMain(m)
}

func newCache(t testing.TB, maxBytes int64) *Cache {
	t.Helper()
	treetest.NeedRoot(t)
	c, err := OpenCache(filepath.Join(t.TempDir(), "cache"), maxBytes)
	require.NoError(t, err)
	return c
}

func resolve(t testing.TB, c *Cache, mounts ...*types.Mount) *Rootfs {
	t.Helper()
	r, err := c.Resolve(context.Background(), mounts)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, r.Release()) })
	return r
}

// layers makes n directories, topmost first, each with a file of its own, one that all have, and one that the next hides.
func layers(t testing.TB, n int) []string {
	t.Helper()
	root := t.TempDir()
	var dirs []string
	for i := range n {
		dir := filepath.Join(root, fmt.Sprintf("%d/fs", i+1))
		treetest.Write(t, filepath.Join(dir, fmt.Sprintf("own/%d", i)), strings.Repeat("x", i*100))
		treetest.Write(t, filepath.Join(dir, "shared/file"), fmt.Sprint(i))
		treetest.Write(t, filepath.Join(dir, fmt.Sprintf("hidden/%d", i)), "gone")
		if i > 0 {
			treetest.Must(t, unix.Mknod(filepath.Join(dir, fmt.Sprintf("hidden/%d", i-1)), unix.S_IFCHR, 0))
		}
		dirs = append([]string{dir}, dirs...)
	}
	return dirs
}

func overlay(dirs []string, more ...string) *types.Mount {
	return m("overlay", "overlay", append([]string{"index=off", "lowerdir=" + strings.Join(dirs, ":")}, more...)...)
}

func TestMergeIsTheKernels(t *testing.T) {
	c := newCache(t, 0)
	dirs := layers(t, 3)
	treetest.Zoo(t, dirs[1])
	top := dirs[0]
	treetest.Must(t, os.Mkdir(filepath.Join(top, "names"), 0o700))
	treetest.Must(t, unix.Setxattr(filepath.Join(top, "names"), "trusted.overlay.opaque", []byte("y"), 0))
	treetest.Write(t, filepath.Join(top, "names/only"), "the rest is hidden")
	treetest.Must(t, unix.Mknod(filepath.Join(top, "fifo"), unix.S_IFCHR, 0))
	treetest.Write(t, filepath.Join(top, "middle-link"), "a file over a link")
	// A whiteout in a directory that no other layer has.
	treetest.Must(t, os.Mkdir(filepath.Join(top, "lonely"), 0o755))
	treetest.Must(t, unix.Mknod(filepath.Join(top, "lonely/nothing"), unix.S_IFCHR, 0))
	r := resolve(t, c, overlay(dirs, "upperdir="+t.TempDir(), "workdir=/nonexistent"))
	require.Len(t, r.Layers, 1)
	require.False(t, r.ReadOnly)
	merged := treetest.Overlay(t, dirs...)
	_, err := os.Lstat(filepath.Join(merged, "lonely/nothing"))
	require.True(t, os.IsNotExist(err))
	want := treetest.Describe(t, merged)
	treetest.Compare(t, want, treetest.Describe(t, treetest.Mount(t, r.Layers[0].Path)))

	again := resolve(t, c, overlay(dirs, "ro"))
	require.Equal(t, r.Layers, again.Layers, "one image for all")
	require.True(t, again.ReadOnly)
}

// Both ways to mount an overlay, whatever this kernel would choose.
func TestManyLayers(t *testing.T) {
	for _, n := range []int{2, 120, MaxLayers} {
		dirs := layers(t, n)
		for name, mount := range map[string]overlayFunc{"fsopen": overlayByFsopen, "mount": overlayByMount} {
			t.Run(fmt.Sprintf("%d/%s", n, name), func(t *testing.T) {
				c := newCache(t, 0)
				c.build = func(ctx context.Context, tr *tree, _ bool, uuid [16]byte, out *os.File) error {
					err := withTree(tr.lowers, tr.merge, c.dir, mount, func(dirfd int) error {
						_, err := erofsimg.Build(ctx, dirfd, out, erofsimg.Options{UUID: uuid})
						return err
					})
					if errors.Is(err, errNoLowerdirAppend) {
						t.Skip(err)
					}
					return err
				}
				r := resolve(t, c, overlay(dirs))
				got := treetest.Describe(t, treetest.Mount(t, r.Layers[0].Path))
				require.Contains(t, got, "own/0")
				require.Contains(t, got, fmt.Sprintf("own/%d", n-1))
				require.Contains(t, got, fmt.Sprintf("hidden/%d", n-1))
				require.NotContains(t, got, "hidden/0")
				entries, err := os.ReadDir(c.dir)
				require.NoError(t, err)
				require.NotEmpty(t, entries, "nothing is mounted over the cache out here")
			})
		}
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	require.NoError(t, err)
	require.NotContains(t, string(mounts), t.Name())
}

func TestSingleLayer(t *testing.T) {
	c := newCache(t, 0)
	dir := t.TempDir()
	treetest.Zoo(t, dir)
	active := resolve(t, c, overlay([]string{dir}, "upperdir="+t.TempDir(), "workdir=/w"))
	require.Len(t, active.Layers, 1)
	treetest.Compare(t, treetest.Describe(t, dir), treetest.Describe(t, treetest.Mount(t, active.Layers[0].Path)))
	view := resolve(t, c, m("bind", dir, "ro", "rbind"))
	require.Equal(t, active.Layers, view.Layers)
	require.True(t, view.ReadOnly)
}

func TestUpperDirectory(t *testing.T) {
	c := newCache(t, 0)
	dirs := layers(t, 2)
	upper := t.TempDir()
	mounts := overlay(dirs, "upperdir="+upper, "workdir=/w")
	require.Len(t, resolve(t, c, mounts).Layers, 1)

	treetest.Write(t, filepath.Join(upper, "new"), "before the start")
	treetest.Must(t, unix.Mknod(filepath.Join(upper, "shared"), unix.S_IFCHR, 0))
	treetest.Must(t, os.Mkdir(filepath.Join(upper, "own"), 0o755))
	treetest.Must(t, unix.Setxattr(filepath.Join(upper, "own"), "trusted.overlay.opaque", []byte("y"), 0))
	want := treetest.Describe(t, treetest.Overlay(t, append([]string{upper}, dirs...)...))

	r, err := c.Resolve(context.Background(), []*types.Mount{mounts})
	require.NoError(t, err)
	require.Len(t, r.Layers, 2)
	require.NotEqual(t, r.Layers[0].Key, r.Layers[1].Key)
	t.Run("layers", func(t *testing.T) {
		top, bottom := treetest.Mount(t, r.Layers[0].Path), treetest.Mount(t, r.Layers[1].Path)
		treetest.Compare(t, want, treetest.Describe(t, treetest.Overlay(t, top, bottom)))
	})
	c.Sweep(context.Background())
	require.FileExists(t, r.Layers[0].Path, "in use")
	require.NoError(t, r.Release())
	require.NoError(t, r.Release())
	require.NoFileExists(t, r.Layers[0].Path)
	require.FileExists(t, r.Layers[1].Path)

	// A renamed directory is a reference into the layers below: everything is merged for this container.
	treetest.Must(t, os.Mkdir(filepath.Join(upper, "moved"), 0o755))
	treetest.Must(t, unix.Setxattr(filepath.Join(upper, "moved"), "trusted.overlay.redirect", []byte("/hidden"), 0))
	treetest.Must(t, unix.Mknod(filepath.Join(upper, "hidden"), unix.S_IFCHR, 0))
	r = resolve(t, c, overlay(dirs, "redirect_dir=on", "upperdir="+upper, "workdir=/w"))
	require.Len(t, r.Layers, 1)
	got := treetest.Describe(t, treetest.Mount(t, r.Layers[0].Path))
	require.Contains(t, got, "moved/1")
	require.NotContains(t, got, "hidden")
}

func TestFirstLayer(t *testing.T) {
	c := newCache(t, 0)
	dir := t.TempDir()
	require.Empty(t, resolve(t, c, m("bind", dir, "rw", "rbind")).Layers)
	treetest.Write(t, filepath.Join(dir, "a"), "b")
	r := resolve(t, c, m("bind", dir, "rw", "rbind"))
	require.Len(t, r.Layers, 1)
	treetest.Compare(t, treetest.Describe(t, dir), treetest.Describe(t, treetest.Mount(t, r.Layers[0].Path)))
	// It can change, so it is never shared.
	require.NotEqual(t, r.Layers[0].Key, resolve(t, c, m("bind", dir, "rw", "rbind")).Layers[0].Key)
}

func TestImages(t *testing.T) {
	c := newCache(t, 0)
	dirs := layers(t, 2)
	var mounts []*types.Mount
	for _, dir := range dirs { // images as the erofs snapshotter has them
		mounts = append(mounts, m("erofs", resolve(t, c, m("bind", dir, "ro")).Layers[0].Path, "ro", "loop"))
	}
	last := m("format/mkdir/overlay", "overlay", "workdir=/w", "upperdir="+t.TempDir(), "lowerdir={{ overlay 0 1 }}")
	r := resolve(t, c, append(mounts, last)...)
	require.Len(t, r.Layers, 2)
	for i, l := range r.Layers {
		require.Equal(t, mounts[i].Source, l.Path)
		require.Len(t, l.Key, 64)
	}
	require.Equal(t, r.Layers, resolve(t, c, append(mounts, last)...).Layers)

	upper := t.TempDir()
	treetest.Write(t, filepath.Join(upper, "new"), "x")
	last.Options[1] = "upperdir=" + upper
	require.Len(t, resolve(t, c, append(mounts, last)...).Layers, 3)
}

func TestResolveRefuses(t *testing.T) {
	c := newCache(t, 0)
	dir := t.TempDir()
	treetest.Write(t, filepath.Join(dir, "text"), strings.Repeat("not an image ", 1000))
	good := resolve(t, c, m("bind", dir, "ro")).Layers[0].Path
	treetest.Must(t, os.Symlink(good, filepath.Join(dir, "link")))
	data, err := os.ReadFile(good)
	require.NoError(t, err)
	treetest.Must(t, os.WriteFile(filepath.Join(dir, "short"), data[:len(data)-4096], 0o600))
	for _, tc := range []struct {
		name  string
		mount *types.Mount
		kind  error
		says  string
	}{
		{"no directory", overlay([]string{dir, "/nonexistent/fs"}), errdefs.ErrNotFound, "/nonexistent/fs is not there"},
		{"no single directory", overlay([]string{"/nonexistent/fs"}), errdefs.ErrNotFound, "was the snapshot removed"},
		{"no upper directory", overlay([]string{dir}, "upperdir=/nonexistent"), errdefs.ErrNotFound, "/nonexistent"},
		{"a file", overlay([]string{filepath.Join(dir, "text")}), errdefs.ErrInvalidArgument, "not a directory"},
		{"a file as first layer", m("bind", filepath.Join(dir, "text"), "rw"), errdefs.ErrInvalidArgument, "not a directory"},
		{"no image", m("erofs", "/nonexistent.erofs", "ro"), errdefs.ErrNotFound, "/nonexistent.erofs"},
		{"text as image", m("erofs", filepath.Join(dir, "text"), "ro"), errdefs.ErrInvalidArgument, "not an EROFS image"},
		{"truncated image", m("erofs", filepath.Join(dir, "short"), "ro"), errdefs.ErrInvalidArgument, "truncated"},
		{"image by link", m("erofs", filepath.Join(dir, "link"), "ro"), errdefs.ErrInvalidArgument, "regular"},
		{"extra device", m("erofs", good, "ro", "device="+good), errdefs.ErrInvalidArgument, "0 further devices"},
		{"device node", m("erofs", "/dev/null", "ro"), errdefs.ErrInvalidArgument, "regular"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, err := c.Resolve(context.Background(), []*types.Mount{tc.mount})
			require.ErrorIs(t, err, tc.kind)
			require.ErrorContains(t, err, tc.says)
		})
	}
}

// Images by another writer, with their contents on a further device.
func TestMultiDeviceImage(t *testing.T) {
	c := newCache(t, 0)
	dir := t.TempDir()
	meta, err := os.Create(filepath.Join(dir, "fsmeta.erofs"))
	require.NoError(t, err)
	defer meta.Close()
	data, err := os.Create(filepath.Join(dir, "layer.erofs"))
	require.NoError(t, err)
	defer data.Close()
	w := erofs.Create(meta, erofs.WithDataFile(data))
	f, err := w.Create("/file")
	require.NoError(t, err)
	_, err = f.Write([]byte(strings.Repeat("x", 10000)))
	require.NoError(t, err)
	require.NoError(t, f.Close())
	require.NoError(t, w.Close())

	r := resolve(t, c, m("erofs", meta.Name(), "ro", "loop", "device="+data.Name()),
		m("format/mkdir/overlay", "overlay", "workdir=/w", "upperdir="+t.TempDir(), "lowerdir={{ mount 0 }}"))
	require.Len(t, r.Layers, 1)
	require.Equal(t, []string{data.Name()}, r.Layers[0].Extra)
	_, err = c.Resolve(context.Background(), []*types.Mount{m("erofs", meta.Name(), "ro", "loop")})
	require.ErrorContains(t, err, "asks for 1 further devices, the mount names 0")
	_, err = c.Resolve(context.Background(), []*types.Mount{m("erofs", meta.Name(), "ro", "device=/nonexistent")})
	require.ErrorIs(t, err, errdefs.ErrNotFound)
}
