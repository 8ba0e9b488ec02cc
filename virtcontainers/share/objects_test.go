// SPDX-License-Identifier: Apache-2.0

package share

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/cloister-project/cloister/internal/idmap"
)

// add returns the place of a path, which the test's end takes out again.
func add(t *testing.T, s *Share, path string, access Access) Place {
	t.Helper()
	p, err := s.Add(t.Context(), path, access, idmap.Map{})
	must(t, err)
	return p
}

func remove(t *testing.T, s *Share, places ...Place) {
	t.Helper()
	for _, p := range places {
		must(t, s.Remove(t.Context(), p))
	}
}

// create makes a file in a place, as virtiofsd would.
func create(t *testing.T, s *Share, p Place, name string) (err error) {
	t.Helper()
	must(t, s.ns.do(t.Context(), func() error {
		var fd int
		fd, err = unix.Openat(s.ns.served, filepath.Join(p.Name, p.Path, name), unix.O_WRONLY|unix.O_CREAT|unix.O_CLOEXEC, 0o644)
		if err == nil {
			unix.Close(fd)
		}
		return nil
	}))
	return err
}

func directories(t *testing.T, paths ...string) (root string) {
	t.Helper()
	root = t.TempDir()
	for _, path := range paths {
		must(t, os.MkdirAll(filepath.Join(root, path), 0o755))
	}
	return root
}

func mount(t *testing.T, source, target, fstype string, flags uintptr) {
	t.Helper()
	must(t, unix.Mount(source, target, fstype, flags, ""))
	t.Cleanup(func() { must(t, unix.Unmount(target, unix.MNT_DETACH)) })
}

// objects: what is one object of the host is one share, however it is asked for.
func objects(t *testing.T, s *Share) {
	host := directories(t, "dir", "other", "bound")
	dir, link, bound := filepath.Join(host, "dir"), filepath.Join(host, "link"), filepath.Join(host, "bound")
	must(t, os.Symlink("dir", link))
	mount(t, dir, bound, "", unix.MS_BIND)

	first := add(t, s, dir, ReadOnly)
	require.ErrorIs(t, create(t, s, first, "f"), unix.EROFS)
	require.Equal(t, first, add(t, s, link, ReadOnly))
	require.Equal(t, first, add(t, s, dir, RecursiveReadOnly), "there is nothing in it")
	other := add(t, s, filepath.Join(host, "other"), ReadOnly)
	require.NotEqual(t, first, other)
	require.ErrorIs(t, create(t, s, first, "f"), unix.EROFS)
	require.Equal(t, first, add(t, s, bound, Writable), "it becomes writable")
	require.NoError(t, create(t, s, first, "f"))
	require.ErrorIs(t, create(t, s, other, "f"), unix.EROFS, "nothing else does")
	remove(t, s, first, first, first)
	require.NoError(t, create(t, s, first, "f"), "it has another user")
	remove(t, s, first, other)
	require.ErrorIs(t, create(t, s, first, "f"), unix.ENOENT)

	// What the host has read-only stays so.
	must(t, unix.Mount("", bound, "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY, ""))
	first = add(t, s, bound, ReadOnly)
	require.Equal(t, first, add(t, s, bound, Writable))
	require.ErrorIs(t, create(t, s, first, "f"), unix.EROFS)
	remove(t, s, first, first)
	require.Empty(t, s.entries)
}

// parts: a directory and one in it are one tree, in whatever order they come.
func parts(t *testing.T, s *Share) {
	host := directories(t, "volume/a/b", "volume/c", "subpath")
	at := func(path string) string { return filepath.Join(host, path) }
	// As the kubelet mounts a subPath.
	mount(t, at("volume/a"), at("subpath"), "", unix.MS_BIND)

	t.Run("the whole first", func(t *testing.T) {
		whole := add(t, s, at("volume"), Writable)
		a, b := add(t, s, at("subpath"), ReadOnly), add(t, s, at("subpath/b"), Writable)
		require.Equal(t, [2]string{whole.Name, "a"}, [2]string{a.Name, a.Path}, "the guest keeps it read-only")
		require.Equal(t, [2]string{whole.Name, "a/b"}, [2]string{b.Name, b.Path})
		var st unix.Stat_t
		must(t, unix.Stat(at("volume/a/b"), &st))
		require.Equal(t, st.Ino, b.Inode)
		remove(t, s, whole, a)
		require.NoError(t, create(t, s, b, "f"), "the whole is in use by its part")
		remove(t, s, b)
		require.Empty(t, s.entries)
	})
	t.Run("the part first", func(t *testing.T) {
		b, c := add(t, s, at("volume/a/b"), ReadOnly), add(t, s, at("volume/c"), Writable)
		require.NotEqual(t, b.Name, c.Name)
		whole := add(t, s, at("volume"), Writable)
		require.Equal(t, []Inside{
			{Path: "a/b", Place: Place{Name: b.Name, Inode: b.Inode}}, {Path: "c", Place: Place{Name: c.Name, Inode: c.Inode}},
		}, whole.Inside)
		require.NoError(t, create(t, s, b, "f"), "it is writable by the whole")
		remove(t, s, b, c)
		require.NoError(t, create(t, s, c, "f"), "the whole uses it")
		require.Equal(t, Place{Name: b.Name, Inode: b.Inode}, add(t, s, at("subpath/b"), Writable), "the part has its own name still")
		a := add(t, s, at("subpath"), Writable)
		require.Equal(t, [2]string{whole.Name, "a"}, [2]string{a.Name, a.Path})
		require.Equal(t, []Inside{{Path: "b", Place: Place{Name: b.Name, Inode: b.Inode}}}, a.Inside)
		outer := add(t, s, host, Writable)
		require.Equal(t, "volume", outer.Inside[len(outer.Inside)-3].Path)
		remove(t, s, whole, a, b, outer)
		require.Empty(t, s.entries)
	})
	t.Run("a writable part of what is read-only", func(t *testing.T) {
		whole, c := add(t, s, at("volume"), ReadOnly), add(t, s, at("volume/c"), Writable)
		require.NotEqual(t, whole.Name, c.Name, "the whole must not become writable")
		require.NoError(t, create(t, s, c, "f"))
		require.ErrorIs(t, create(t, s, whole, "c/f"), unix.EROFS)
		remove(t, s, whole, c)
	})
	t.Run("something else is in its place", func(t *testing.T) {
		whole := add(t, s, at("volume"), Writable)
		must(t, os.Rename(at("volume/c"), at("volume/d")))
		must(t, os.Mkdir(at("volume/c"), 0o755))
		c, d := add(t, s, at("volume/c"), Writable), add(t, s, at("volume/d"), Writable)
		require.Equal(t, "c", c.Path)
		require.Equal(t, "d", d.Path)
		mount(t, "tmpfs", at("volume/d"), "tmpfs", 0)
		hidden := add(t, s, at("volume/d"), Writable)
		require.NotEqual(t, whole.Name, hidden.Name, "mounted after the whole was shared")
		remove(t, s, whole, c, d, hidden)
		require.Empty(t, s.entries)
	})
}

// mappedOwners: what is asked for under the ids of a user namespace is an object of its own, of which parts are parts.
func mappedOwners(t *testing.T, s *Share) {
	host := directories(t, "dir/part", "dir/below")
	mount(t, "tmpfs", filepath.Join(host, "dir/below"), "tmpfs", 0)
	ids := idmap.Map{UIDs: "0:1000:65536", GIDs: "0:2000:65536"}
	under := func(path string, access Access) Place {
		p, err := s.Add(t.Context(), filepath.Join(host, path), access, ids)
		must(t, err)
		return p
	}
	owner := func(p Place, path string) (owner [2]uint32) {
		must(t, s.ns.do(t.Context(), func() error {
			var st unix.Stat_t
			err := unix.Fstatat(s.ns.served, filepath.Join(p.Name, p.Path, path), &st, 0)
			owner = [2]uint32{st.Uid, st.Gid}
			return err
		}))
		return owner
	}
	plain, mapped := add(t, s, filepath.Join(host, "dir"), Writable), under("dir", ReadOnly)
	require.NotEqual(t, plain.Name, mapped.Name)
	require.Equal(t, [2]uint32{0, 0}, owner(plain, ""))
	require.Equal(t, [2]uint32{1000, 2000}, owner(mapped, ""))
	require.Equal(t, [2]uint32{0, 0}, owner(mapped, "below"), "not recursively")
	part := under("dir/part", ReadOnly)
	require.Equal(t, [2]string{mapped.Name, "part"}, [2]string{part.Name, part.Path})
	require.Equal(t, mapped, under("dir", Writable), "it becomes writable, and stays mapped")
	require.ErrorIs(t, create(t, s, mapped, "part/f"), unix.EOVERFLOW, "root is nobody there")
	must(t, s.ns.do(t.Context(), func() error { // as virtiofsd does for the guest's users
		unix.SetfsgidRetGid(2000)
		unix.SetfsuidRetUid(1000)
		return nil
	}))
	err := create(t, s, part, "f")
	must(t, s.ns.do(t.Context(), func() error {
		unix.SetfsuidRetUid(0)
		unix.SetfsgidRetGid(0)
		return nil
	}))
	require.NoError(t, err)
	require.Equal(t, [2]uint32{1000, 2000}, owner(part, "f"))
	var st unix.Stat_t
	must(t, unix.Stat(filepath.Join(host, "dir/part/f"), &st))
	require.Equal(t, [2]uint32{0, 0}, [2]uint32{st.Uid, st.Gid}, "on the host it belongs to root")
	remove(t, s, plain, mapped, mapped, part)
	require.Empty(t, s.entries)

	_, err = s.Add(t.Context(), "/proc/self/task", Writable, ids)
	require.ErrorIs(t, err, errdefs.ErrNotImplemented)
	require.ErrorContains(t, err, "hostUsers")
	_, err = s.Add(t.Context(), host, Writable, idmap.Map{UIDs: "0:0:0", GIDs: "0:0:0"})
	require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
}

// submounts: mounts below are told, and what has other mounts in it is another object.
func submounts(t *testing.T, s *Share) {
	host := directories(t, "a/b", "c")
	at := func(path string) string { return filepath.Join(host, path) }
	before := add(t, s, host, Writable)
	require.Empty(t, before.Submounts)
	mount(t, "tmpfs", at("a/b"), "tmpfs", 0)
	must(t, os.Mkdir(at("a/b/inner"), 0o755))
	mount(t, "tmpfs", at("a/b/inner"), "tmpfs", 0)

	after := add(t, s, host, ReadOnly)
	require.NotEqual(t, before.Name, after.Name)
	require.Equal(t, []string{"a/b", "a/b/inner"}, after.Submounts)
	require.ErrorIs(t, create(t, s, after, "f"), unix.EROFS)
	require.NoError(t, create(t, s, after, "a/b/f"), "not recursively")
	a := add(t, s, at("a"), ReadOnly)
	require.Equal(t, [2]string{after.Name, "a"}, [2]string{a.Name, a.Path})
	require.Equal(t, []string{"b", "b/inner"}, a.Submounts)
	inner := add(t, s, at("a/b/inner"), RecursiveReadOnly)
	require.Equal(t, [2]string{after.Name, "a/b/inner"}, [2]string{inner.Name, inner.Path}, "a mount in it is a part of it")
	require.Equal(t, after.Name, add(t, s, host, RecursiveReadOnly).Name, "the guest keeps it so")
	require.Equal(t, after.Name, add(t, s, host, Writable).Name)
	require.NoError(t, create(t, s, after, "f"))
	remove(t, s, after, after, after, a, inner, before)

	recursive := add(t, s, host, RecursiveReadOnly)
	require.ErrorIs(t, create(t, s, recursive, "a/b/f2"), unix.EROFS)
	top := add(t, s, host, ReadOnly)
	require.NotEqual(t, recursive.Name, top.Name, "it cannot be undone")
	require.NoError(t, create(t, s, top, "a/b/f2"))
	remove(t, s, recursive, top)
	require.Empty(t, s.entries)
}
