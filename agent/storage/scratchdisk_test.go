// SPDX-License-Identifier: Apache-2.0

package storage

import (
	"context"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	agentv1 "github.com/cloister-project/cloister/agent-protocol/v1"
	"github.com/cloister-project/cloister/internal/idmap"
)

// loopDisk gives the Store a disk of so many bytes, a sparse file behind a loop device.
func loopDisk(t *testing.T, disks *fakeDisks, serial string, size int64) {
	t.Helper()
	file, err := os.Create(filepath.Join(t.TempDir(), "disk"))
	require.NoError(t, err)
	defer file.Close()
	require.NoError(t, file.Truncate(size))
	control, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		t.Skipf("no loop devices: %v", err)
	}
	defer control.Close()
	number, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
	require.NoError(t, err)
	path := "/dev/loop" + strconv.Itoa(number)
	loop, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Skipf("no loop device: %v", err)
	}
	// Closed last of all: it frees itself then.
	config := unix.LoopConfig{Fd: uint32(file.Fd()), Info: unix.LoopInfo64{Flags: unix.LO_FLAGS_AUTOCLEAR}}
	require.NoError(t, unix.IoctlLoopConfigure(int(loop.Fd()), &config))
	t.Cleanup(func() { require.NoError(t, loop.Close()) })
	disks.files[serial] = path
}

// scratchStore is a Store with a scratch disk; the machine's kernel must have what the guest's has.
func scratchStore(t *testing.T, size int64) *Store {
	t.Helper()
	s, disks := newStore(t)
	loopDisk(t, disks, "scratch", size)
	require.NoError(t, s.SetupScratch("scratch"))
	<-s.disk.ready
	if s.disk.err != nil && strings.Contains(s.disk.err.Error(), "prjquota") {
		t.Skipf("this machine's kernel has no project quotas: %v", s.disk.err)
	}
	require.NoError(t, s.disk.err)
	t.Cleanup(func() {
		s.background.Wait()
		require.NoError(t, unix.Unmount(s.disk.path, 0))
	})
	return s
}

// writeLimited writes a file as containers do: without CAP_SYS_RESOURCE, which no quota binds.
func writeLimited(path string, content []byte) error {
	result := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with this function
		header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		var caps [2]unix.CapUserData
		err := unix.Capget(&header, &caps[0])
		if err == nil {
			caps[0].Effective &^= 1 << unix.CAP_SYS_RESOURCE
			err = unix.Capset(&header, &caps[0])
		}
		if err == nil {
			err = os.WriteFile(path, content, 0o600)
		}
		result <- err
	}()
	return <-result
}

func TestScratchDisk(t *testing.T) {
	const size = 64 << 20
	s := scratchStore(t, size)
	mounts, err := s.PrepareMounts(t.Context(), "c", []*agentv1.Mount{
		scratchMount("disk", 0, 0o2775), scratchMount("limited", 1<<20, 0o777), scratchMount("memory", 1<<20, 0o777),
	})
	require.NoError(t, err)
	var stat unix.Statfs_t
	for i, kind := range []int64{unix.EXT4_SUPER_MAGIC, unix.EXT4_SUPER_MAGIC, unix.EXT4_SUPER_MAGIC} {
		require.NoError(t, unix.Statfs(mounts[i].Source, &stat))
		require.Equal(t, kind, int64(stat.Type))
	}
	info, err := os.Stat(mounts[0].Source)
	require.NoError(t, err)
	require.Equal(t, os.ModeDir|os.ModeSetgid|0o775, info.Mode())

	// What is there before anything is written is the directories.
	var stats agentv1.SandboxStatsResponse
	s.Usage(&stats)
	require.Positive(t, stats.GetScratchDisk().GetLimitBytes())
	require.Len(t, stats.GetScratchVolumes(), 3)
	require.EqualValues(t, 1, stats.GetScratchVolumes()["disk"].GetUsedInodes())
	require.EqualValues(t, 1<<20+quotaBlock, stats.GetScratchVolumes()["limited"].GetLimitBytes())
	require.False(t, stats.GetScratchVolumes()["memory"].GetMemory(), "memory is its name")

	// A volume's limit is its own, and what is deleted counts no more.
	big := make([]byte, 2<<20)
	require.ErrorIs(t, writeLimited(mounts[1].Source+"/big", big), unix.EDQUOT)
	require.NoError(t, os.WriteFile(mounts[0].Source+"/big", big, 0o600))
	require.NoError(t, os.Remove(mounts[1].Source+"/big"))
	require.NoError(t, os.WriteFile(mounts[1].Source+"/small", big[:512<<10], 0o600))

	// All of it is the disk's.
	require.ErrorIs(t, os.WriteFile(mounts[0].Source+"/all", make([]byte, size), 0o600), unix.ENOSPC)
	require.NoError(t, os.Remove(mounts[0].Source+"/all"))
	_, err = s.Remove(t.Context(), "c")
	require.NoError(t, err)
}

func TestScratchVolumeInMemory(t *testing.T) {
	s := scratchStore(t, 64<<20)
	m := scratchMount("memory", 1<<20, 0o777)
	m.GetScratch().Memory = true
	mounts, err := s.PrepareMounts(t.Context(), "c", []*agentv1.Mount{m})
	require.NoError(t, err)
	var stat unix.Statfs_t
	require.NoError(t, unix.Statfs(mounts[0].Source, &stat))
	require.EqualValues(t, unix.TMPFS_MAGIC, stat.Type)
	require.NoError(t, os.WriteFile(mounts[0].Source+"/f", make([]byte, 8192), 0o600))
	var stats agentv1.SandboxStatsResponse
	s.Usage(&stats)
	usage := stats.GetScratchVolumes()["memory"]
	require.True(t, usage.GetMemory())
	require.EqualValues(t, []uint64{8192, 1 << 20, 2}, []uint64{usage.GetUsedBytes(), usage.GetLimitBytes(), usage.GetUsedInodes()})
	_, err = s.Remove(t.Context(), "c")
	require.NoError(t, err)
}

func TestPartsOfAScratchVolume(t *testing.T) {
	s := scratchStore(t, 64<<20)
	part := func(path string) *agentv1.Mount {
		m := scratchMount("v", 0, 0o2770)
		m.GetScratch().Path = path
		return m
	}
	whole, err := s.PrepareMounts(t.Context(), "c1", []*agentv1.Mount{scratchMount("v", 0, 0o2770), part("a/b")})
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(whole[0].Source+"/a/b/f", []byte("one"), 0o600))
	require.Equal(t, "one", read(t, whole[1].Source, "f"))
	info, err := os.Stat(whole[1].Source)
	require.NoError(t, err)
	require.Equal(t, os.ModeDir|os.ModeSetgid|0o770, info.Mode(), "as the volume")

	// A file that a container has made, and links of a container's, which lead nowhere.
	require.NoError(t, os.Symlink("/etc", whole[0].Source+"/link"))
	require.NoError(t, unix.Mkfifo(whole[0].Source+"/fifo", 0o600))
	file, err := s.PrepareMounts(t.Context(), "c2", []*agentv1.Mount{part("a/b/f")})
	require.NoError(t, err)
	require.Equal(t, "one", read(t, file[0].Source))
	for path, kind := range map[string]error{
		"link": errdefs.ErrInvalidArgument, "link/passwd": unix.ENOTDIR, "a/b/f/x": unix.ENOTDIR, "fifo": errdefs.ErrInvalidArgument,
		"../x": errdefs.ErrInvalidArgument, "/x": errdefs.ErrInvalidArgument, "a//b": errdefs.ErrInvalidArgument,
	} {
		_, err := s.PrepareMounts(t.Context(), "c3", []*agentv1.Mount{part(path)})
		require.ErrorIs(t, err, kind, path)
	}
	for _, c := range []string{"c2", "c1"} {
		_, err = s.Remove(t.Context(), c)
		require.NoError(t, err)
	}
}

// A container's writable layer is on the disk, has a limit, and is gone with the container.
func TestWritableLayerOnTheScratchDisk(t *testing.T) {
	s := scratchStore(t, 64<<20)
	disks, err := s.newDisks()
	require.NoError(t, err)
	disks.(*fakeDisks).add(t, "layer", map[string]string{"of/the/image": "x"})
	root := func(id string, limit uint64, readonly bool) string {
		path, err := s.MountRootfs(t.Context(), id, &agentv1.Rootfs{
			Layers: []*agentv1.Layer{{Serial: "layer", Filesystem: "erofs"}}, WritableBytes: limit,
		}, readonly, idmap.Map{})
		require.NoError(t, err)
		return path
	}
	a, b := root("a", 1<<20, false), root("b", 0, false)
	require.ErrorIs(t, writeLimited(a+"/big", make([]byte, 2<<20)), unix.EDQUOT)
	require.NoError(t, os.WriteFile(b+"/of/the/other", make([]byte, 2<<20), 0o600))
	require.NoError(t, os.Rename(b+"/of/the/other", b+"/moved"), "within one project")
	require.NoError(t, os.RemoveAll(b+"/of"))
	require.NoError(t, os.MkdirAll(b+"/"+strings.Repeat("d/", 200), 0o700))
	require.Len(t, below(t, s.disk.path, "."), 4, "lost+found, the trash, two layers")
	var stats agentv1.SandboxStatsResponse
	s.Usage(&stats)
	require.Len(t, stats.GetWritableLayers(), 2)
	require.GreaterOrEqual(t, stats.GetWritableLayers()["b"].GetUsedBytes(), uint64(2<<20))
	require.Less(t, stats.GetWritableLayers()["a"].GetUsedBytes(), uint64(2<<20))
	c := root("c", 0, true)
	require.ErrorIs(t, os.WriteFile(c+"/big", make([]byte, readonlyBytes+1), 0o600), unix.ENOSPC)
	for _, id := range []string{"a", "b", "c"} {
		_, err = s.Remove(t.Context(), id)
		require.NoError(t, err)
	}
	s.background.Wait()
	require.Len(t, below(t, s.disk.path, "."), 2)
	require.Empty(t, below(t, s.disk.path, trash))
}

func TestSetupScratchRefuses(t *testing.T) {
	s, _ := newStore(t)
	require.NoError(t, s.SetupScratch(""))
	require.ErrorIs(t, s.SetupScratch("a/b"), errdefs.ErrInvalidArgument)
	require.NoError(t, s.SetupScratch("scratch")) // there is no such disk
	require.ErrorIs(t, s.SetupScratch("scratch"), errdefs.ErrAlreadyExists)
	_, err := s.PrepareMounts(t.Context(), "c", []*agentv1.Mount{scratchMount("v", 0, 0o755)})
	require.ErrorIs(t, err, context.DeadlineExceeded)
	require.ErrorContains(t, err, "scratch disk: disk with serial number scratch")
	s.background.Wait()
}
