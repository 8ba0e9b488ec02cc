// SPDX-License-Identifier: Apache-2.0

package share

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/cloister-project/cloister/agent-protocol/wire"
	"github.com/cloister-project/cloister/internal/idmap"
)

func TestMain(m *testing.M) {
	if dir := os.Getenv(childEnv); dir != "" {
		child(dir)
		return
	}
	goleak.VerifyTestMain(m)
}

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: it mounts")
	}
}

// daemons are the virtiofsd programs to test with: CLOISTER_TEST_VIRTIOFSD and CLOISTER_TEST_VIRTIOFSD_C, or what is installed.
func daemons(t *testing.T) []string {
	t.Helper()
	list := slices.DeleteFunc([]string{os.Getenv("CLOISTER_TEST_VIRTIOFSD"), os.Getenv("CLOISTER_TEST_VIRTIOFSD_C")},
		func(path string) bool { return path == "" })
	if len(list) == 0 {
		for _, path := range []string{"/usr/libexec/virtiofsd", "/usr/lib/qemu/virtiofsd"} {
			if _, err := os.Stat(path); err == nil {
				list = append(list, path)
			}
		}
	}
	if len(list) == 0 {
		t.Skip("no virtiofsd: install it or set CLOISTER_TEST_VIRTIOFSD")
	}
	return list
}

func forEachDaemon(t *testing.T, test func(t *testing.T, virtiofsd string)) {
	needRoot(t)
	for _, path := range daemons(t) {
		f, err := probe(context.Background(), path, "")
		require.NoError(t, err)
		t.Run(string(f.Variant), func(t *testing.T) { test(t, path) })
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	require.NoError(t, err)
}

// stateDir is a directory whose path is short enough for a socket.
func stateDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "share-")
	must(t, err)
	t.Cleanup(func() { must(t, os.RemoveAll(dir)) })
	return dir
}

func openFiles(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	must(t, err)
	return len(entries)
}

func TestNamespace(t *testing.T) {
	needRoot(t)
	ctx := context.Background()
	files := openFiles(t)
	host, dir := t.TempDir(), stateDir(t)
	must(t, os.WriteFile(filepath.Join(host, "file"), []byte("contents"), 0o644))
	must(t, os.Mkdir(filepath.Join(host, "sub"), 0o755))
	// As on hosts with systemd: mounts are shared.
	must(t, unix.Mount(host, host, "", unix.MS_BIND, ""))
	defer func() { _ = unix.Unmount(host, unix.MNT_DETACH) }()
	must(t, unix.Mount("", host, "", unix.MS_SHARED, ""))

	n, err := newNamespace(ctx, dir, func(served string) error {
		_, err := os.Stat(served)
		return err
	})
	must(t, err)
	// in reads a file of the served root, as virtiofsd would.
	in := func(path string) (contents string) {
		must(t, n.do(ctx, func() error {
			fd, err := unix.Openat(n.served, path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
			if err != nil {
				contents = err.Error()
				return nil
			}
			defer unix.Close(fd)
			buf := make([]byte, 100)
			c, err := unix.Read(fd, buf)
			contents = string(buf[:max(c, 0)])
			return err
		}))
		return contents
	}
	write := func(path string) (result error) {
		must(t, n.do(ctx, func() error {
			fd, err := unix.Openat(n.served, path, unix.O_WRONLY|unix.O_CREAT|unix.O_CLOEXEC, 0o644)
			if err == nil {
				unix.Close(fd)
			}
			result = err
			return nil
		}))
		return result
	}
	add := func(name, path string, access Access) {
		fd, err := open(path)
		must(t, err)
		defer unix.Close(fd)
		o, err := look(fd)
		must(t, err)
		tree, err := cloneTree(fd, access)
		must(t, err)
		defer unix.Close(tree)
		must(t, n.do(ctx, func() error { return n.attach(tree, name, o.isDir) }))
	}
	t.Run("the host's tree is gone", func(t *testing.T) {
		must(t, n.do(ctx, func() error {
			var names []string
			fd, err := unix.Open("/", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
			if err != nil {
				return err
			}
			defer unix.Close(fd)
			buf := make([]byte, 4096)
			c, err := unix.ReadDirent(fd, buf)
			_, _, names = unix.ParseDirent(buf[:c], -1, nil)
			require.Equal(t, []string{servedDir}, names)
			return err
		}))
	})
	add("rw", host, Writable)
	add("ro", host, ReadOnly)
	add("one", filepath.Join(host, "file"), Writable)
	require.Equal(t, "contents", in("rw/file"))
	require.Equal(t, "contents", in("ro/file"))
	require.Equal(t, "contents", in("one"))
	require.NoError(t, write("rw/new"))
	require.FileExists(t, filepath.Join(host, "new"))
	require.ErrorIs(t, write("ro/new2"), unix.EROFS)
	require.ErrorIs(t, write("new3"), unix.EROFS, "the root itself")

	t.Run("mounts on the host", func(t *testing.T) {
		sub := filepath.Join(host, "sub")
		must(t, unix.Mount("tmpfs", sub, "tmpfs", 0, ""))
		must(t, os.WriteFile(filepath.Join(sub, "inner"), []byte("later"), 0o644))
		require.Equal(t, unix.ENOENT.Error(), in("rw/sub/inner"), "later ones do not show")
		require.Equal(t, unix.ENOENT.Error(), in("ro/sub/inner"))
		add("later", host, RecursiveReadOnly)
		require.Equal(t, "later", in("later/sub/inner"))
		require.ErrorIs(t, write("later/sub/x"), unix.EROFS)
		add("top", host, ReadOnly)
		require.ErrorIs(t, write("top/x"), unix.EROFS)
		require.NoError(t, write("top/sub/x"), "not recursively")
		must(t, n.do(ctx, func() error { return n.detach("top", true) }))
		must(t, unix.Unmount(sub, 0)) // nothing keeps it busy
		require.Equal(t, "later", in("later/sub/inner"), "as it was when it was shared")
		must(t, unix.Unmount(host, unix.MNT_DETACH))
		require.Equal(t, "contents", in("rw/file"))
	})
	t.Run("detach", func(t *testing.T) {
		must(t, n.do(ctx, func() error { return n.detach("rw", true) }))
		must(t, n.do(ctx, func() error { return n.detach("one", false) }))
		require.Equal(t, unix.ENOENT.Error(), in("rw/file"))
		require.Equal(t, unix.ENOENT.Error(), in("one"))
	})
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	must(t, err)
	require.NotContains(t, string(mounts), dir)
	entries, err := os.ReadDir(dir)
	must(t, err)
	require.Empty(t, entries)
	n.stop()
	n.stop()
	<-n.ended
	require.ErrorIs(t, n.do(ctx, func() error { return nil }), errdefs.ErrUnavailable)
	require.Equal(t, files, openFiles(t))
}

func TestShare(t *testing.T) {
	forEachDaemon(t, func(t *testing.T, virtiofsd string) {
		ctx := context.Background()
		dir, probes := stateDir(t), t.TempDir()
		files := openFiles(t)
		s, err := Start(ctx, Config{Virtiofsd: virtiofsd, StateDir: dir, ProbeDir: probes})
		must(t, err)
		require.NoError(t, s.Err())
		require.FileExists(t, filepath.Join(probes, only(t, probes)))
		host := t.TempDir()
		place, err := s.Add(ctx, host, Writable, idmap.Map{})
		must(t, err)
		require.True(t, wire.ValidID(place.Name))
		require.NoError(t, s.Remove(ctx, place))
		require.ErrorIs(t, s.Remove(ctx, place), errdefs.ErrNotFound)
		t.Run("objects", func(t *testing.T) { objects(t, s) })
		t.Run("parts", func(t *testing.T) { parts(t, s) })
		t.Run("submounts", func(t *testing.T) { submounts(t, s) })
		t.Run("mapped owners", func(t *testing.T) { mappedOwners(t, s) })

		for path, kind := range map[string]error{
			"/nonexistent": errdefs.ErrNotFound, host + "/../../nonexistent/x": errdefs.ErrNotFound,
			"relative": errdefs.ErrInvalidArgument, "/dev/null": errdefs.ErrNotImplemented, s.Socket(): errdefs.ErrNotImplemented,
		} {
			_, err := s.Add(ctx, path, Writable, idmap.Map{})
			require.ErrorIs(t, err, kind, path)
		}
		cancelled, cancel := context.WithCancel(ctx)
		cancel()
		_, _ = s.Add(cancelled, host, Writable, idmap.Map{}) // either way nothing leaks
		process := fmt.Sprintf("/proc/%d", s.PID())
		require.DirExists(t, process)
		must(t, s.Close(ctx))
		must(t, s.Close(ctx))
		<-s.Done()
		require.ErrorIs(t, s.Err(), errdefs.ErrUnavailable)
		_, err = s.Add(ctx, host, Writable, idmap.Map{})
		require.ErrorIs(t, err, errdefs.ErrUnavailable)
		require.NoDirExists(t, process)
		require.NoFileExists(t, s.Socket())
		require.Equal(t, files, openFiles(t))
	})
}

func only(t *testing.T, dir string) string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	must(t, err)
	require.Len(t, entries, 1)
	return entries[0].Name()
}

func TestStartRefuses(t *testing.T) {
	needRoot(t)
	ctx := context.Background()
	dir := stateDir(t)
	_, err := Start(ctx, Config{Virtiofsd: "/nonexistent/virtiofsd", StateDir: dir})
	require.ErrorIs(t, err, errdefs.ErrNotFound)
	require.ErrorContains(t, err, "hypervisor.virtiofsd")
	_, err = Start(ctx, Config{Virtiofsd: "/bin/true", StateDir: dir})
	require.ErrorIs(t, err, errdefs.ErrFailedPrecondition)
	_, err = Start(ctx, Config{Virtiofsd: "/bin/true", StateDir: "/" + strings.Repeat("x", 100)})
	require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
	entries, err := os.ReadDir(dir)
	must(t, err)
	require.Empty(t, entries)
}

// A virtiofsd that ends by itself is noticed, with what it said.
func TestDaemonEnds(t *testing.T) {
	needRoot(t)
	dir := stateDir(t)
	script := filepath.Join(t.TempDir(), "virtiofsd")
	must(t, os.WriteFile(script, []byte(`#!/bin/sh
[ "$1" = --help ] && echo "--shared-dir --sandbox --fd" && exit
echo "something is wrong" >&2
exit 3
`), 0o755))
	s, err := Start(context.Background(), Config{Virtiofsd: script, StateDir: dir})
	must(t, err)
	<-s.Done()
	require.ErrorContains(t, s.Err(), "something is wrong")
	require.ErrorContains(t, s.Err(), "exit status 3")
	must(t, s.Close(context.Background()))
}

const childEnv = "CLOISTER_TEST_SHARE_CHILD"

func child(dir string) {
	s, err := Start(context.Background(), Config{Virtiofsd: os.Getenv("CLOISTER_TEST_SHARE_DAEMON"), StateDir: dir})
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	if _, err := s.Add(context.Background(), "/etc", ReadOnly, idmap.Map{}); err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	fmt.Println(s.PID())
	select {}
}

func TestParseHelp(t *testing.T) {
	f, err := parseHelp("  --shared-dir <D>\n --sandbox <S>\n --fd <FD>\n --allow-mmap\n --announce-submounts\n --rlimit-nofile <N>")
	must(t, err)
	require.Equal(t, features{variantRust, true, true, true}, f)
	require.Equal(t, []string{"--fd=3", "--shared-dir=/r", "--sandbox=namespace", "--xattr", "--log-level=warn", "--cache=never",
		"--allow-mmap", "--announce-submounts", "--rlimit-nofile=5"}, f.arguments("/r", 3, 5))
	f, err = parseHelp("-o sandbox=namespace|chroot\n -o source=PATH\n -o announce_submounts\n --fd=FDNUM")
	must(t, err)
	require.Equal(t, features{Variant: variantC, AnnounceSubmounts: true}, f)
	require.Equal(t, []string{"-f", "--fd=3", "-o",
		"source=/r,sandbox=namespace,cache=auto,timeout=0,xattr,log_level=warn,announce_submounts"},
		f.arguments("/r", 3, 5))
	_, err = parseHelp("usage: something else")
	require.ErrorIs(t, err, errdefs.ErrFailedPrecondition)
}

func TestTail(t *testing.T) {
	l := &tail{max: 5}
	for _, s := range []string{"abc", "defg", "h"} {
		n, err := l.Write([]byte(s))
		must(t, err)
		require.Equal(t, len(s), n)
	}
	require.Equal(t, "defgh", l.String())
}

// waitGone waits until a process is gone, by its pidfd.
func waitGone(t *testing.T, pidfd int) {
	t.Helper()
	fds := []unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}
	for end := time.Now().Add(20 * time.Second); ; {
		n, err := unix.Poll(fds, int(time.Until(end).Milliseconds()))
		if err == unix.EINTR {
			continue
		}
		must(t, err)
		require.Equal(t, 1, n, "the process still runs")
		return
	}
}
