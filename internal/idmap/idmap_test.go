// SPDX-License-Identifier: Apache-2.0

package idmap

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

func TestOf(t *testing.T) {
	uids := []specs.LinuxIDMapping{{HostID: 1000, Size: 10}, {ContainerID: 10, HostID: 5000, Size: 2}}
	require.Equal(t, Map{"0:1000:10,10:5000:2", "0:1000:10"}, Of(uids, uids[:1]))
	require.True(t, Of(nil, nil).IsZero())
	require.False(t, Of(uids, nil).IsZero())
}

func TestOpen(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("makes user namespaces: needs root")
	}
	dir := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(dir, "file"), nil, 0o600))
	before, err := os.ReadDir("/proc/self/fd")
	require.NoError(t, err)
	for range 50 { // the process may be stopped already when it is killed, or not
		namespace, err := Map{"0:1000:10,20:3000:5", "0:2000:10"}.Open()
		require.NoError(t, err)
		tree, err := unix.OpenTree(unix.AT_FDCWD, dir, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
		require.NoError(t, err)
		require.NoError(t, unix.MountSetattr(tree, "", unix.AT_EMPTY_PATH,
			&unix.MountAttr{Attr_set: unix.MOUNT_ATTR_IDMAP, Userns_fd: uint64(namespace.Fd())}))
		require.NoError(t, namespace.Close())
		var st unix.Stat_t
		require.NoError(t, unix.Fstatat(tree, "file", &st, 0))
		require.EqualValues(t, 1000, st.Uid)
		require.EqualValues(t, 2000, st.Gid)
		require.NoError(t, unix.Close(tree))
	}
	after, err := os.ReadDir("/proc/self/fd")
	require.NoError(t, err)
	require.Len(t, after, len(before), "a descriptor is left")
	children, err := filepath.Glob("/proc/self/task/*/children")
	require.NoError(t, err)
	for _, path := range children {
		left, err := os.ReadFile(path)
		if err == nil {
			require.Empty(t, string(left), "a process is left")
		}
	}
}

func TestOpenRefuses(t *testing.T) {
	for _, bad := range []string{"", "0", "0:1", "0:1:0", "0:1:2:3", "-1:1:1", "0:1:4294967296", "a:b:c", "0:1:1,",
		strings.Repeat("0:1:1,", 340) + "0:1:1"} {
		_, err := Map{bad, "0:0:1"}.Open()
		require.True(t, errdefs.IsInvalidArgument(err), "%q: %v", bad, err)
		_, err = Map{"0:0:1", bad}.Open()
		require.True(t, errdefs.IsInvalidArgument(err), "%q: %v", bad, err)
	}
	if os.Getuid() == 0 {
		_, err := Map{"0:1000:10,5:2000:10", "0:1:1"}.Open() // they overlap
		require.ErrorIs(t, err, unix.EINVAL)
	}
}
