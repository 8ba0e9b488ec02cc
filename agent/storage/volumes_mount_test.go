// SPDX-License-Identifier: Apache-2.0

package storage

import (
	"math"
	"os"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	agentv1 "github.com/cloister-project/cloister/agent-protocol/v1"
)

func scratchMount(name string, size uint64, mode uint32, options ...string) *agentv1.Mount {
	return &agentv1.Mount{Destination: "/s", Options: options, Source: &agentv1.Mount_Scratch{Scratch: &agentv1.ScratchVolume{
		Name: name, SizeBytes: size, Mode: mode, Uid: 7, Gid: 8,
	}}}
}

func TestVolumeMounts(t *testing.T) {
	s := volumeStore(t)
	putVolume(t, s, putRequest(1, true, &agentv1.VolumeFile{Path: "d/f", Mode: 0o440, Uid: 7, Gid: 8, Content: []byte("one")}))
	for name, m := range map[string]*agentv1.Mount{
		"unknown": volumeMount("other", ""), "missing file": volumeMount("v", "d/g"), "below a file": volumeMount("v", "d/f/g"),
		"directory": volumeMount("v", "d"), "up": volumeMount("v", "../x"), "link": volumeMount("v", "..data/d/f"),
		"options": volumeMount("v", "", "size=1m"), "remount": volumeMount("v", "", "remount"),
	} {
		_, err := s.PrepareMounts(t.Context(), "c", []*agentv1.Mount{file(&agentv1.FileCopy{}), m})
		require.Error(t, err, name)
		require.Empty(t, below(t, s.root, "c"), name)
	}

	got, err := s.PrepareMounts(t.Context(), "c", []*agentv1.Mount{
		volumeMount("v", "", "rbind", "rprivate", "rw", "rrw", "suid", "rsuid", "dev", "rdev", "noatime"), volumeMount("v", "d/f"),
	})
	require.NoError(t, err)
	require.Equal(t, []string{"rbind", "rprivate", "noatime", "ro", "nosuid", "nodev"}, got[0].Options)
	require.Equal(t, []string{"rbind", "ro", "nosuid", "nodev"}, got[1].Options)
	require.Equal(t, "one", read(t, got[0].Source, "d/f"))
	info, err := os.Stat(got[1].Source)
	require.NoError(t, err)
	require.Equal(t, os.FileMode(0o440), info.Mode())
	require.Equal(t, [2]uint32{7, 8}, [2]uint32{info.Sys().(*syscall.Stat_t).Uid, info.Sys().(*syscall.Stat_t).Gid})

	// The volume changes under the container, its one file does not.
	putVolume(t, s, putRequest(2, true, part("d/f", "two")))
	require.Equal(t, "two", read(t, got[0].Source, "d/f"))
	require.Equal(t, "one", read(t, got[1].Source))
	putVolume(t, s, putRequest(3, true))
	require.Equal(t, "one", read(t, got[1].Source))

	_, err = s.Remove(t.Context(), "c")
	require.NoError(t, err)
	require.Empty(t, below(t, s.root, "c"))
	require.Len(t, below(t, s.root, "volumes"), 1, "volumes are the pod's")
}

func TestVolumeScratch(t *testing.T) {
	s := volumeStore(t)
	first, err := s.PrepareMounts(t.Context(), "c1", []*agentv1.Mount{
		scratchMount("s", 1<<20, 0o2770, "rbind", "rw", "suid", "rsuid", "dev", "rdev"), scratchMount("t", 0, 0o755, "ro"),
	})
	require.NoError(t, err)
	require.NotEqual(t, first[0].Source, first[1].Source)
	require.Contains(t, first[0].Options, "rw")
	require.Contains(t, first[1].Options, "ro")
	require.Contains(t, first[0].Options, "suid", "as on any disk")
	var stat unix.Statfs_t
	require.NoError(t, unix.Statfs(first[0].Source, &stat))
	require.EqualValues(t, 1<<20, stat.Blocks*uint64(stat.Bsize))
	require.Zero(t, stat.Flags&unix.ST_NODEV)
	info, err := os.Stat(first[0].Source)
	require.NoError(t, err)
	require.Equal(t, os.ModeDir|os.ModeSetgid|0o770, info.Mode())
	require.Equal(t, [2]uint32{7, 8}, [2]uint32{info.Sys().(*syscall.Stat_t).Uid, info.Sys().(*syscall.Stat_t).Gid})

	// Without a limit: half of the memory, as the kernel has it.
	var memory unix.Sysinfo_t
	require.NoError(t, unix.Sysinfo(&memory))
	require.NoError(t, unix.Statfs(first[1].Source, &stat))
	require.InDelta(t, float64(memory.Totalram)*float64(memory.Unit)/2, float64(stat.Blocks*uint64(stat.Bsize)), 64<<20)

	// It outlives its first container; what another asks for changes nothing.
	require.NoError(t, os.WriteFile(first[0].Source+"/f", []byte("kept"), 0o600))
	_, err = s.Remove(t.Context(), "c1")
	require.NoError(t, err)
	second, err := s.PrepareMounts(t.Context(), "c2", []*agentv1.Mount{scratchMount("s", 2<<20, 0o777)})
	require.NoError(t, err)
	require.Equal(t, first[0].Source, second[0].Source)
	require.Equal(t, "kept", read(t, second[0].Source, "f"))
	require.NoError(t, unix.Statfs(second[0].Source, &stat))
	require.EqualValues(t, 1<<20, stat.Blocks*uint64(stat.Bsize))

	// The limit is one.
	err = os.WriteFile(second[0].Source+"/big", make([]byte, 2<<20), 0o600)
	require.ErrorIs(t, err, unix.ENOSPC)
	_, err = s.Remove(t.Context(), "c2")
	require.NoError(t, err)
}

func TestVolumeScratchRefusals(t *testing.T) {
	scratch := func(v *agentv1.ScratchVolume) *agentv1.Mount {
		return &agentv1.Mount{Destination: "/s", Source: &agentv1.Mount_Scratch{Scratch: v}}
	}
	for name, m := range map[string]*agentv1.Mount{
		"no name":   scratch(&agentv1.ScratchVolume{}),
		"nil":       scratch(nil),
		"name":      scratch(&agentv1.ScratchVolume{Name: "../x"}),
		"long name": scratch(&agentv1.ScratchVolume{Name: strings.Repeat("a", 65)}),
		// The kernel rounds up to pages, beyond 64 bits: 0 is no limit.
		"size":    scratch(&agentv1.ScratchVolume{Name: "a", SizeBytes: math.MaxUint64}),
		"no uid":  scratch(&agentv1.ScratchVolume{Name: "a", Uid: math.MaxUint32}),
		"no gid":  scratch(&agentv1.ScratchVolume{Name: "a", Gid: math.MaxUint32}),
		"options": scratchMount("a", 0, 0o755, "remount"),
	} {
		require.ErrorIs(t, checkMounts([]*agentv1.Mount{m}), errdefs.ErrInvalidArgument, name)
	}
}
