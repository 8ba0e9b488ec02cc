// SPDX-License-Identifier: Apache-2.0

package storage

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	agentv1 "github.com/cloister-project/cloister/agent-protocol/v1"
	"github.com/cloister-project/cloister/agent-protocol/wire"
)

func sharedPart(p *agentv1.SharedPath) *agentv1.Mount {
	p.Tag = "host"
	return &agentv1.Mount{Destination: "/s", Source: &agentv1.Mount_Shared{Shared: p}}
}

func inode(t *testing.T, path string) uint64 {
	t.Helper()
	var st unix.Stat_t
	require.NoError(t, unix.Stat(path, &st))
	return st.Ino
}

func TestPartsOfAShare(t *testing.T) {
	s, _ := newStore(t)
	host := fakeShare(t, s, "host")
	at := func(path string) string { return filepath.Join(host, "volume", path) }
	require.NoError(t, os.MkdirAll(at("part/of"), 0o755))
	require.NoError(t, os.WriteFile(at("part/file"), []byte("of the part"), 0o644))
	require.NoError(t, os.Symlink("part", at("link")))
	require.NoError(t, unix.Mount("tmpfs", at("part/of"), "tmpfs", 0, ""))
	defer func() { require.NoError(t, unix.Unmount(at("part/of"), unix.MNT_DETACH)) }()
	require.NoError(t, os.WriteFile(at("part/of/inner"), []byte("mounted"), 0o644))

	got, err := s.PrepareMounts(t.Context(), "c", []*agentv1.Mount{
		sharedPart(&agentv1.SharedPath{Name: "volume", Path: "part", Inode: inode(t, at("part")), Submounts: []string{"of", "gone", "file"}}),
		sharedPart(&agentv1.SharedPath{Name: "volume", Path: "part/file", Inode: inode(t, at("part/file"))}),
		sharedPart(&agentv1.SharedPath{Name: "volume", Path: "part/of/inner"}),
		sharedPart(&agentv1.SharedPath{Name: "volume", Path: "part/of"}),
	})
	require.NoError(t, err)
	require.Equal(t, "of the part", read(t, got[0].Source, "file"))
	require.Equal(t, "mounted", read(t, got[0].Source, "of/inner"), "with the mounts in it")
	require.Equal(t, "of the part", read(t, got[1].Source))
	require.Equal(t, "mounted", read(t, got[2].Source))
	require.Equal(t, "mounted", read(t, got[3].Source, "inner"))
	_, err = s.Remove(t.Context(), "c")
	require.NoError(t, err)
	require.FileExists(t, at("part/file"))

	for name, p := range map[string]*agentv1.SharedPath{
		"link":       {Name: "volume", Path: "link"},
		"via a link": {Name: "volume", Path: "link/file"},
		"missing":    {Name: "volume", Path: "part/missing"},
		"in a file":  {Name: "volume", Path: "part/file/x"},
	} {
		_, err := s.PrepareMounts(t.Context(), "c", []*agentv1.Mount{sharedPart(p)})
		require.Error(t, err, name)
	}
	_, err = s.PrepareMounts(t.Context(), "c", []*agentv1.Mount{
		sharedPart(&agentv1.SharedPath{Name: "volume", Path: "part", Inode: inode(t, at("part")) + 1}),
	})
	require.ErrorIs(t, err, errdefs.ErrFailedPrecondition)
	require.ErrorContains(t, err, "something else")
}

func TestCheckShared(t *testing.T) {
	long := strings.Repeat("a", wire.MaxSharedPath)
	for _, path := range []string{"", "a", "a/b", "..a", long} {
		require.NoError(t, checkShared(&agentv1.SharedPath{Path: path}), path)
	}
	for _, path := range []string{".", "..", "/", "/a", "a/", "a//b", "a/../b", "../a", "./a", "a\x00", long + "a"} {
		require.ErrorIs(t, checkShared(&agentv1.SharedPath{Path: path}), errdefs.ErrInvalidArgument, path)
		require.ErrorIs(t, checkShared(&agentv1.SharedPath{Submounts: []string{"a", path}}), errdefs.ErrInvalidArgument, path)
	}
	require.ErrorIs(t, checkShared(&agentv1.SharedPath{Submounts: []string{""}}), errdefs.ErrInvalidArgument)
	require.ErrorIs(t, checkShared(&agentv1.SharedPath{Submounts: make([]string, wire.MaxSubmounts+1)}), errdefs.ErrInvalidArgument)
	many := make([]string, wire.MaxSubmountPaths/len(long)+1)
	for i := range many {
		many[i] = long
	}
	require.ErrorIs(t, checkShared(&agentv1.SharedPath{Submounts: many}), errdefs.ErrInvalidArgument)
}

func FuzzCheckShared(f *testing.F) {
	for _, path := range []string{"a", "a/b", "../a", "/", "a/./b", "a\x00"} {
		f.Add(path)
	}
	f.Fuzz(func(t *testing.T, path string) {
		if path == "" || checkShared(&agentv1.SharedPath{Path: path}) != nil {
			return
		}
		rest, err := filepath.Rel("/share", filepath.Join("/share", path))
		require.NoError(t, err)
		require.Equal(t, path, rest, "it leads nowhere else")
		require.False(t, rest == ".." || strings.HasPrefix(rest, "../"))
	})
}
