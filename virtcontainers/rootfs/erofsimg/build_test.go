// SPDX-License-Identifier: Apache-2.0

package erofsimg_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/cloister-project/cloister/virtcontainers/rootfs/erofsimg"
	"github.com/cloister-project/cloister/virtcontainers/rootfs/internal/treetest"
)

// build makes an image of dir on a thread of its own, as Build asks for.
func build(ctx context.Context, dir, image string, opts erofsimg.Options) (info erofsimg.Info, err error) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // never unlocked: the thread ends with its changed directory
		if err = unix.Unshare(unix.CLONE_FS); err != nil {
			return
		}
		var fd int
		if fd, err = unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0); err != nil {
			return
		}
		defer unix.Close(fd)
		var f *os.File
		if f, err = os.Create(image); err != nil {
			return
		}
		defer f.Close()
		info, err = erofsimg.Build(ctx, fd, f, opts)
	}()
	<-done
	return info, err
}

func TestBuildKeepsEverything(t *testing.T) {
	treetest.NeedRoot(t)
	src, image := t.TempDir(), filepath.Join(t.TempDir(), "image")
	treetest.Zoo(t, src)
	info, err := build(context.Background(), src, image, erofsimg.Options{UUID: [16]byte{1, 2, 3}})
	require.NoError(t, err)
	st, err := os.Stat(image)
	require.NoError(t, err)
	require.Equal(t, st.Size(), info.Bytes)
	f, err := os.Open(image)
	require.NoError(t, err)
	defer f.Close()
	require.NoError(t, erofsimg.Verify(f, st.Size(), [16]byte{1, 2, 3}))
	require.Error(t, erofsimg.Verify(f, st.Size(), [16]byte{1}))
	require.Less(t, st.Size(), int64(64<<20), "holes take no space")
	treetest.Compare(t, treetest.Describe(t, src), treetest.Describe(t, treetest.Mount(t, image)))
}

func TestBuildIsReproducible(t *testing.T) {
	treetest.NeedRoot(t)
	src, out := t.TempDir(), t.TempDir()
	treetest.Zoo(t, src)
	var first []byte
	for i := range 2 {
		image := filepath.Join(out, fmt.Sprint(i))
		_, err := build(context.Background(), src, image, erofsimg.Options{})
		require.NoError(t, err)
		data, err := os.ReadFile(image)
		require.NoError(t, err)
		sum := sha256.Sum256(data)
		if i == 0 {
			first = sum[:]
		}
		require.True(t, bytes.Equal(first, sum[:]))
	}
}

func TestLargeDirectory(t *testing.T) {
	treetest.NeedRoot(t)
	src, image := t.TempDir(), filepath.Join(t.TempDir(), "image")
	for i := range 12000 {
		treetest.Must(t, os.WriteFile(filepath.Join(src, fmt.Sprintf("f%d", i*7919%100003)), nil, 0o644))
	}
	_, err := build(context.Background(), src, image, erofsimg.Options{})
	require.NoError(t, err)
	treetest.Compare(t, treetest.Describe(t, src), treetest.Describe(t, treetest.Mount(t, image)))
}

func TestEmptyRoot(t *testing.T) {
	treetest.NeedRoot(t)
	src, image := t.TempDir(), filepath.Join(t.TempDir(), "image")
	_, err := build(context.Background(), src, image, erofsimg.Options{})
	require.NoError(t, err)
	treetest.Compare(t, treetest.Describe(t, src), treetest.Describe(t, treetest.Mount(t, image)))
}

func TestLargeXattrs(t *testing.T) {
	treetest.NeedRoot(t)
	// tmpfs takes more than one block of attributes for a file; ext4 does not.
	src, image := t.TempDir(), filepath.Join(t.TempDir(), "image")
	if err := unix.Mount("tmpfs", src, "tmpfs", 0, ""); err != nil {
		t.Skip("no tmpfs")
	}
	t.Cleanup(func() { _ = unix.Unmount(src, 0) })
	for i := range 9 {
		name := filepath.Join(src, fmt.Sprint(i))
		treetest.Write(t, name, strings.Repeat("z", 900*i))
		for j := range i {
			err := unix.Setxattr(name, fmt.Sprintf("trusted.a%d", j), bytes.Repeat([]byte{byte(j)}, 1500), 0)
			if errors.Is(err, unix.EOPNOTSUPP) {
				t.Skip("tmpfs without attributes")
			}
			treetest.Must(t, err)
		}
	}
	_, err := build(context.Background(), src, image, erofsimg.Options{})
	require.NoError(t, err)
	treetest.Compare(t, treetest.Describe(t, src), treetest.Describe(t, treetest.Mount(t, image)))
}

func TestOverlayMarks(t *testing.T) {
	treetest.NeedRoot(t)
	src := t.TempDir()
	treetest.Must(t, os.Mkdir(filepath.Join(src, "opaque"), 0o755))
	treetest.Must(t, unix.Setxattr(filepath.Join(src, "opaque"), "trusted.overlay.opaque", []byte("y"), 0))
	treetest.Must(t, unix.Setxattr(filepath.Join(src, "opaque"), "trusted.overlay.origin", []byte("o"), 0))
	treetest.Must(t, unix.Mknod(filepath.Join(src, "gone"), unix.S_IFCHR, 0))
	for _, keep := range []bool{false, true} {
		image := filepath.Join(t.TempDir(), "image")
		_, err := build(context.Background(), src, image, erofsimg.Options{KeepOverlay: keep})
		require.NoError(t, err)
		got := treetest.Describe(t, treetest.Mount(t, image))
		_, there := got["gone"]
		require.Equal(t, keep, there)
		require.Equal(t, keep, strings.Contains(got["opaque"], "trusted.overlay.opaque"))
		require.NotContains(t, got["opaque"], "origin")
	}
	treetest.Must(t, unix.Setxattr(filepath.Join(src, "opaque"), "trusted.overlay.redirect", []byte("/x"), 0))
	_, err := build(context.Background(), src, filepath.Join(t.TempDir(), "image"), erofsimg.Options{KeepOverlay: true})
	require.ErrorIs(t, err, erofsimg.ErrNeedsMerge)
}

func TestBuildRefuses(t *testing.T) {
	treetest.NeedRoot(t)
	src := t.TempDir()
	treetest.Write(t, filepath.Join(src, "a/b"), "x")
	_, err := build(context.Background(), src, filepath.Join(t.TempDir(), "image"), erofsimg.Options{MaxInodes: 2})
	require.ErrorIs(t, err, errdefs.ErrResourceExhausted)
	require.ErrorContains(t, err, `"/a/b"`)

	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	_, err = build(ctx, src, filepath.Join(t.TempDir(), "image"), erofsimg.Options{})
	require.ErrorIs(t, err, context.Canceled)

	inner := filepath.Join(src, "a")
	treetest.Must(t, unix.Mount("tmpfs", inner, "tmpfs", 0, ""))
	defer func() { _ = unix.Unmount(inner, 0) }()
	_, err = build(context.Background(), src, filepath.Join(t.TempDir(), "image"), erofsimg.Options{})
	require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
	require.ErrorContains(t, err, "something is mounted here")
}

func TestVerifyFindsDamage(t *testing.T) {
	treetest.NeedRoot(t)
	src, image := t.TempDir(), filepath.Join(t.TempDir(), "image")
	treetest.Write(t, filepath.Join(src, "a"), strings.Repeat("x", 100000))
	_, err := build(context.Background(), src, image, erofsimg.Options{})
	require.NoError(t, err)
	good, err := os.ReadFile(image)
	require.NoError(t, err)
	check := func(b []byte) error { return erofsimg.Verify(bytes.NewReader(b), int64(len(b)), [16]byte{}) }
	require.NoError(t, check(good))
	require.Error(t, check(good[:len(good)-1]))
	require.Error(t, check(good[:1100]))
	require.Error(t, check(nil))
	require.Error(t, check(make([]byte, len(good))))
	bad := bytes.Clone(good)
	bad[1200] ^= 1
	require.Error(t, check(bad))
}

func FuzzInspect(f *testing.F) {
	b := make([]byte, 8192)
	f.Add(b)
	copy(b[1024:], []byte{0xe2, 0xe1, 0xf5, 0xe0, 0, 0, 0, 0, 1, 0, 0, 0, 12})
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		info, err := erofsimg.Inspect(bytes.NewReader(b), int64(len(b)))
		if err == nil && info.Bytes > int64(len(b)) {
			t.Fatalf("accepted an image of %d bytes in a file of %d", info.Bytes, len(b))
		}
		_ = erofsimg.Verify(bytes.NewReader(b), int64(len(b)), [16]byte{})
	})
}
