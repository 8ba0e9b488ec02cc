// SPDX-License-Identifier: Apache-2.0

package rootfs

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/cloister-project/cloister/virtcontainers/rootfs/internal/treetest"
)

// A child process of a test: opens the cache in the first argument and resolves the read-only bind of the second.
const childEnv = "CLOISTER_TEST_ROOTFS_CHILD"

func child() {
	args := strings.Split(os.Getenv(childEnv), "\n")
	c, err := OpenCache(args[1], 0)
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	inner := c.build
	c.build = func(ctx context.Context, t *tree, keep bool, uuid [16]byte, out *os.File) error {
		fmt.Println("building")
		if args[0] == "hang" {
			_, _ = out.Write(make([]byte, 100000))
			select {}
		}
		return inner(ctx, t, keep, uuid, out)
	}
	r, err := c.Resolve(context.Background(), []*types.Mount{m("bind", args[2], "ro")})
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	fmt.Println("resolved", r.Layers[0].Path)
	_ = r.Release()
}

func startChild(t *testing.T, how, cache, dir string) (*exec.Cmd, *bufio.Reader) {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), childEnv+"="+strings.Join([]string{how, cache, dir}, "\n"))
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	return cmd, bufio.NewReader(out)
}

func countBuilds(c *Cache) *atomic.Int32 {
	var n atomic.Int32
	inner := c.build
	c.build = func(ctx context.Context, t *tree, keep bool, uuid [16]byte, out *os.File) error {
		n.Add(1)
		return inner(ctx, t, keep, uuid, out)
	}
	return &n
}

func TestOneBuildForAll(t *testing.T) {
	c := newCache(t, 0)
	dir := t.TempDir()
	treetest.Zoo(t, dir)
	other, err := OpenCache(c.dir, 0) // as another process has it
	require.NoError(t, err)
	mine, theirs := countBuilds(c), countBuilds(other)
	var children []*exec.Cmd
	var outs []*bufio.Reader
	for range 2 {
		cmd, out := startChild(t, "go", c.dir, dir)
		children, outs = append(children, cmd), append(outs, out)
	}
	var wg sync.WaitGroup
	for i := range 20 {
		cache := c
		if i%2 == 1 {
			cache = other
		}
		wg.Go(func() {
			r, err := cache.Resolve(context.Background(), []*types.Mount{m("bind", dir, "ro")})
			if err == nil {
				err = r.Release()
			}
			if err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	built := mine.Load() + theirs.Load()
	for i, cmd := range children {
		for {
			line, err := outs[i].ReadString('\n')
			if err != nil {
				break
			}
			if line == "building\n" {
				built++
			}
		}
		require.NoError(t, cmd.Wait())
	}
	require.Equal(t, int32(1), built)
	require.Empty(t, c.flights)
	treetest.Compare(t, treetest.Describe(t, dir), treetest.Describe(t, treetest.Mount(t, resolve(t, c, m("bind", dir, "ro")).Layers[0].Path)))
}

func TestBuilderKilled(t *testing.T) {
	c := newCache(t, 0)
	dir := layers(t, 1)[0]
	cmd, out := startChild(t, "hang", c.dir, dir)
	line, err := out.ReadString('\n')
	require.NoError(t, err)
	require.Equal(t, "building\n", line)

	// Others wait for the builder, as long as they like.
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	_, err = c.Resolve(ctx, []*types.Mount{m("bind", dir, "ro")})
	require.ErrorIs(t, err, context.DeadlineExceeded)

	temps, _ := filepath.Glob(filepath.Join(c.dir, "*"+tempSuffix))
	require.Len(t, temps, 1)
	c.Sweep(context.Background())
	require.FileExists(t, temps[0], "the builder lives")
	require.NoError(t, cmd.Process.Kill())
	_ = cmd.Wait()
	require.FileExists(t, temps[0])

	r := resolve(t, c, m("bind", dir, "ro"))
	treetest.Compare(t, treetest.Describe(t, dir), treetest.Describe(t, treetest.Mount(t, r.Layers[0].Path)))
	temps, _ = filepath.Glob(filepath.Join(c.dir, "*"+tempSuffix))
	require.Empty(t, temps)
}

func TestSweep(t *testing.T) {
	c := newCache(t, 0)
	key := strings.Repeat("ab", 32)
	for _, name := range []string{key + tempSuffix, key + lockSuffix, freshPrefix + key + imageSuffix} {
		treetest.Write(t, filepath.Join(c.dir, name), "left behind")
	}
	c.Sweep(context.Background())
	entries, err := os.ReadDir(c.dir)
	require.NoError(t, err)
	require.Empty(t, entries)
}

func TestCancelledBuild(t *testing.T) {
	c := newCache(t, 0)
	dir := layers(t, 1)[0]
	started := make(chan struct{})
	inner := c.build
	c.build = func(ctx context.Context, _ *tree, _ bool, _ [16]byte, _ *os.File) error {
		close(started)
		<-ctx.Done()
		return ctx.Err()
	}
	ctx, cancel := context.WithCancel(context.Background())
	go func() { <-started; cancel() }()
	_, err := c.Resolve(ctx, []*types.Mount{m("bind", dir, "ro")})
	require.ErrorIs(t, err, context.Canceled)
	c2 := &Cache{dir: c.dir, flights: map[string]*flight{}, build: inner}
	require.Len(t, resolve(t, c2, m("bind", dir, "ro")).Layers, 1, "waits for the cancelled one to end")
}

func TestDamagedImage(t *testing.T) {
	c := newCache(t, 0)
	dir := layers(t, 1)[0]
	mount := m("bind", dir, "ro")
	want := treetest.Describe(t, dir)
	for name, damage := range map[string]func(path string) error{
		"truncated":  func(path string) error { return os.Truncate(path, 8192) },
		"emptied":    func(path string) error { return os.Truncate(path, 0) },
		"superblock": func(path string) error { return overwrite(path, 1060) },
		"zeros":      func(path string) error { return os.WriteFile(path, make([]byte, 1<<20), 0o600) },
	} {
		t.Run(name, func(t *testing.T) {
			builds := countBuilds(c)
			r := resolve(t, c, mount)
			require.NoError(t, r.Release())
			before := builds.Load()
			require.NoError(t, damage(r.Layers[0].Path))
			r = resolve(t, c, mount)
			require.Equal(t, before+1, builds.Load())
			treetest.Compare(t, want, treetest.Describe(t, treetest.Mount(t, r.Layers[0].Path)))
		})
	}
}

func overwrite(path string, at int64) error {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = f.WriteAt([]byte{0xff}, at)
	return err
}

func TestEviction(t *testing.T) {
	c := newCache(t, 3<<20)
	image := func(name string) string {
		dir := filepath.Join(t.TempDir(), name)
		treetest.Write(t, filepath.Join(dir, "a"), strings.Repeat(name, 1<<20))
		return dir
	}
	a, b, d, e := image("a"), image("b"), image("d"), image("e")
	first := resolve(t, c, m("bind", a, "ro")) // stays in use
	second := resolve(t, c, m("bind", b, "ro"))
	require.NoError(t, second.Release())
	third := resolve(t, c, m("bind", d, "ro"))
	require.NoFileExists(t, second.Layers[0].Path, "nobody used it")
	require.FileExists(t, first.Layers[0].Path, "the oldest is in use")
	require.FileExists(t, third.Layers[0].Path)
	require.NoError(t, third.Release())
	fourth := resolve(t, c, m("bind", e, "ro"))
	require.NoFileExists(t, third.Layers[0].Path)
	require.FileExists(t, fourth.Layers[0].Path)
	locks, _ := filepath.Glob(filepath.Join(c.dir, "*"+lockSuffix))
	require.Len(t, locks, 2, "lock files go with their images")
}

// Many images are built, used and evicted at a time: every user finds what it asked for.
func TestEvictionUnderLoad(t *testing.T) {
	c := newCache(t, 1)
	var dirs []string
	for i := range 5 {
		dir := filepath.Join(t.TempDir(), fmt.Sprint(i))
		treetest.Write(t, filepath.Join(dir, "a"), strings.Repeat(fmt.Sprint(i), 30000))
		dirs = append(dirs, dir)
	}
	other, err := OpenCache(c.dir, 1)
	require.NoError(t, err)
	var wg sync.WaitGroup
	for w := range 8 {
		cache := c
		if w%2 == 0 {
			cache = other
		}
		wg.Go(func() {
			for i := range 15 {
				r, err := cache.Resolve(context.Background(), []*types.Mount{m("bind", dirs[(w+i)%len(dirs)], "ro")})
				if err != nil {
					t.Error(err)
					return
				}
				if _, err := os.Stat(r.Layers[0].Path); err != nil {
					t.Error(err)
				}
				if err := r.Release(); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
}

func TestUnusableCache(t *testing.T) {
	c := newCache(t, 0)
	dir := layers(t, 1)[0]
	mount := []*types.Mount{m("bind", dir, "ro")}

	_, err := OpenCache("relative", 0)
	require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
	_, err = OpenCache("/dev/null/x", 0)
	require.ErrorIs(t, err, errdefs.ErrFailedPrecondition)
	require.ErrorContains(t, err, "rootfs.cache_dir")

	small := t.TempDir()
	require.NoError(t, unix.Mount("tmpfs", small, "tmpfs", 0, "size=1m"))
	defer func() { _ = unix.Unmount(small, unix.MNT_DETACH) }()
	full, err := OpenCache(filepath.Join(small, "cache"), 0)
	require.NoError(t, err)
	r, err := full.Resolve(context.Background(), mount)
	require.NoError(t, err)
	require.NoError(t, r.Release())
	// Makes room by eviction.
	fits := t.TempDir()
	treetest.Write(t, filepath.Join(fits, "a"), strings.Repeat("x", 1<<20-4200))
	rr, err := full.Resolve(context.Background(), []*types.Mount{m("bind", fits, "ro")})
	require.NoError(t, err)
	require.NoFileExists(t, r.Layers[0].Path)
	_, err = full.Resolve(context.Background(), mount)
	require.ErrorIs(t, err, errdefs.ErrResourceExhausted)
	require.ErrorContains(t, err, "free space")
	require.NoError(t, rr.Release())
	require.NoError(t, unix.Mount("", small, "", unix.MS_REMOUNT|unix.MS_RDONLY, ""))
	_, err = full.Resolve(context.Background(), mount)
	require.ErrorIs(t, err, errdefs.ErrFailedPrecondition)
	require.ErrorContains(t, err, "cannot be written")

	failure := errors.New("build failed")
	c.build = func(context.Context, *tree, bool, [16]byte, *os.File) error { return failure }
	_, err = c.Resolve(context.Background(), mount)
	require.ErrorIs(t, err, failure)
	temps, _ := filepath.Glob(filepath.Join(c.dir, "*"+tempSuffix))
	require.Empty(t, temps)
}

func BenchmarkBuild(b *testing.B) {
	treetest.NeedRoot(b)
	dir := os.Getenv("CLOISTER_BENCH_TREE")
	if dir == "" {
		b.Skip("set CLOISTER_BENCH_TREE to a directory")
	}
	for b.Loop() {
		c, err := OpenCache(b.TempDir(), 0)
		require.NoError(b, err)
		r, err := c.Resolve(context.Background(), []*types.Mount{m("bind", dir, "ro")})
		require.NoError(b, err)
		st, err := os.Stat(r.Layers[0].Path)
		require.NoError(b, err)
		b.SetBytes(st.Size())
		require.NoError(b, r.Release())
	}
}
