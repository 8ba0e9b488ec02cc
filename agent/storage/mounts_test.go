// SPDX-License-Identifier: Apache-2.0

package storage

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	agentv1 "github.com/cloister-project/cloister/agent-protocol/v1"
	"github.com/cloister-project/cloister/agent-protocol/wire"
)

func filesystem(kind string, options ...string) *agentv1.Mount {
	return &agentv1.Mount{Destination: "/x", Options: options,
		Source: &agentv1.Mount_Filesystem{Filesystem: &agentv1.GuestFilesystem{Type: kind}}}
}

func file(f *agentv1.FileCopy) *agentv1.Mount {
	return &agentv1.Mount{Destination: "/f", Options: []string{"rbind", "rprivate", "ro"}, Source: &agentv1.Mount_File{File: f}}
}

func shared(tag, name string, options ...string) *agentv1.Mount {
	return &agentv1.Mount{Destination: "/s", Options: options, Source: &agentv1.Mount_Shared{Shared: &agentv1.SharedPath{Tag: tag,
		Name: name}}}
}

// fakeShare puts a directory where a virtio-fs device would be mounted.
func fakeShare(t *testing.T, s *Store, tag string) string {
	t.Helper()
	mounted := make(chan struct{})
	close(mounted)
	path := t.TempDir()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.shares[tag] = &share{path: path, mounted: mounted, users: map[string]int{}}
	return path
}

func TestPrepareMounts(t *testing.T) {
	s, _ := newStore(t)
	require.NoError(t, s.SetupShm(0))
	host := fakeShare(t, s, "host")
	require.NoError(t, os.Mkdir(filepath.Join(host, "directory"), 0o755))
	require.NoError(t, os.WriteFile(filepath.Join(host, "file"), []byte("live"), 0o644))

	got, err := s.PrepareMounts(t.Context(), "c", []*agentv1.Mount{
		filesystem("proc", "nosuid", "noexec", "nodev"),
		filesystem("tmpfs", "nosuid", "size=65536k", "mode=755"),
		{Destination: "/dev/shm/", Source: &agentv1.Mount_PodShm{PodShm: &agentv1.PodShm{}}},
		file(&agentv1.FileCopy{Content: []byte("hello"), Mode: 0o440, Uid: 7, Gid: 8}),
		shared("host", "directory", "rbind", "rslave", "suid", "rw"),
		shared("host", "file", "bind", "ro"),
	})
	require.NoError(t, err)
	require.Len(t, got, 6)
	require.Equal(t, specs.Mount{Destination: "/x", Type: "proc", Source: "proc", Options: []string{"nosuid", "noexec", "nodev"}}, got[0])
	require.Equal(t, []string{"nosuid", "size=65536k", "mode=755"}, got[1].Options)
	require.Equal(t, specs.Mount{Destination: "/dev/shm", Type: "bind", Source: s.shmPath(), Options: []string{"rbind"}}, got[2])

	require.Equal(t, []string{"rbind", "rprivate", "ro"}, got[3].Options)
	require.Equal(t, "hello", read(t, got[3].Source))
	info, err := os.Stat(got[3].Source)
	require.NoError(t, err)
	require.Equal(t, os.FileMode(0o440), info.Mode())
	require.Equal(t, uint32(7), info.Sys().(*syscall.Stat_t).Uid)
	require.Equal(t, uint32(8), info.Sys().(*syscall.Stat_t).Gid)

	// Propagation stays, set-user-ID does not.
	require.Equal(t, []string{"rbind", "rslave", "rw", "nosuid", "nodev"}, got[4].Options)
	require.NoError(t, os.WriteFile(filepath.Join(host, "directory", "later"), []byte("x"), 0o644))
	require.Equal(t, "x", read(t, got[4].Source, "later"))
	require.Equal(t, "live", read(t, got[5].Source))
	require.True(t, strings.HasPrefix(got[5].Source, s.root))

	_, err = s.PrepareMounts(t.Context(), "c", nil)
	require.ErrorIs(t, err, errdefs.ErrAlreadyExists)
	_, err = s.Remove(t.Context(), "c")
	require.NoError(t, err)
	require.Equal(t, "x", read(t, host, "directory", "later"), "removal leaves the host's files alone")
}

func TestSharedPathIsNotFollowed(t *testing.T) {
	s, _ := newStore(t)
	host := fakeShare(t, s, "host")
	require.NoError(t, os.Symlink("/etc/passwd", filepath.Join(host, "link")))
	require.NoError(t, unix.Mkfifo(filepath.Join(host, "fifo"), 0o600))
	for _, name := range []string{"link", "fifo", "..", "a/b", "", "missing"} {
		// The file before is taken back with it.
		_, err := s.PrepareMounts(t.Context(), "c", []*agentv1.Mount{file(&agentv1.FileCopy{}), shared("host", name)})
		require.Error(t, err, name)
		t.Log(err)
	}
	_, err := s.PrepareMounts(t.Context(), "c", []*agentv1.Mount{shared("other", "a")})
	require.ErrorIs(t, err, errdefs.ErrFailedPrecondition)
}

func TestMountRefusals(t *testing.T) {
	big := &agentv1.FileCopy{Content: make([]byte, wire.MaxFileCopy)}
	for name, mounts := range map[string][]*agentv1.Mount{
		"type":         {filesystem("ext4")},
		"overlay":      {filesystem("overlay", "lowerdir=/")},
		"bind":         {{Destination: "/x", Options: []string{"idmap"}, Source: &agentv1.Mount_PodShm{PodShm: &agentv1.PodShm{}}}},
		"remount":      {filesystem("tmpfs", "remount")},
		"option":       {filesystem("sysfs", "size=1")},
		"joined":       {filesystem("tmpfs", "size=1,uid=0")},
		"line":         {filesystem("tmpfs", "size=1\n")},
		"options":      {filesystem("tmpfs", make([]string, maxOptions+1)...)},
		"relative":     {{Destination: "x", Source: &agentv1.Mount_PodShm{PodShm: &agentv1.PodShm{}}}},
		"root":         {{Destination: "/..", Source: &agentv1.Mount_PodShm{PodShm: &agentv1.PodShm{}}}},
		"nul":          {{Destination: "/a\x00", Source: &agentv1.Mount_PodShm{PodShm: &agentv1.PodShm{}}}},
		"long":         {{Destination: "/" + strings.Repeat("a", 4096), Source: &agentv1.Mount_PodShm{PodShm: &agentv1.PodShm{}}}},
		"no source":    {{Destination: "/x"}},
		"too many":     make([]*agentv1.Mount, wire.MaxMounts+1),
		"big file":     {file(&agentv1.FileCopy{Content: make([]byte, wire.MaxFileCopy+1)})},
		"files":        {file(big), file(big), file(&agentv1.FileCopy{Content: []byte("x")})},
		"setuid":       {file(&agentv1.FileCopy{Mode: 0o4755})},
		"no owner":     {file(&agentv1.FileCopy{Uid: 1<<32 - 1})},
		"nil content":  {{Destination: "/x", Source: &agentv1.Mount_Filesystem{}}},
		"bind of proc": {filesystem("proc", "bind")},
	} {
		require.ErrorIs(t, checkMounts(mounts), errdefs.ErrInvalidArgument, name)
	}
}

func TestShm(t *testing.T) {
	s, _ := newStore(t)
	_, err := s.PrepareMounts(t.Context(), "c", []*agentv1.Mount{{Destination: "/dev/shm",
		Source: &agentv1.Mount_PodShm{PodShm: &agentv1.PodShm{}}}})
	require.ErrorIs(t, err, errdefs.ErrFailedPrecondition)
	for _, size := range []uint64{1 << 20, 2 << 20} {
		require.NoError(t, s.SetupShm(size))
		var stat unix.Statfs_t
		require.NoError(t, unix.Statfs(s.shmPath(), &stat))
		require.Equal(t, size, stat.Blocks*uint64(stat.Bsize))
	}
}

func TestConfidentialTakesNoDirectories(t *testing.T) {
	s := &Store{}
	s.Confidential("snp")
	require.ErrorIs(t, s.MountShared(t.Context(), "there"), errdefs.ErrFailedPrecondition)
	_, err := s.bindShared(&container{}, 0, &agentv1.SharedPath{Tag: "there", Name: "x"})
	require.ErrorContains(t, err, "platform snp")
}

func TestMountShared(t *testing.T) {
	s, _ := newStore(t)
	for _, tag := range []string{"", "a/b", "-a", strings.Repeat("a", 37)} {
		require.ErrorIs(t, s.MountShared(t.Context(), tag), errdefs.ErrInvalidArgument, tag)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	err := s.MountShared(ctx, "nobody")
	require.ErrorIs(t, err, context.DeadlineExceeded)
	require.Empty(t, s.shares)
	fakeShare(t, s, "there")
	require.NoError(t, s.MountShared(t.Context(), "there"))
}

func FuzzCheckMounts(f *testing.F) {
	f.Add("tmpfs", "/a", "size=1m")
	f.Add("proc", "/../..", "hidepid=2")
	f.Fuzz(func(t *testing.T, kind, destination, option string) {
		m := filesystem(kind, option)
		m.Destination = destination
		if checkMounts([]*agentv1.Mount{m}) == nil {
			require.NotContains(t, option, ",")
			require.True(t, strings.HasPrefix(filepath.Clean(destination), "/"))
		}
	})
}
