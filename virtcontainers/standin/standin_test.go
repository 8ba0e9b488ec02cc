// SPDX-License-Identifier: Apache-2.0

package standin

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cloister-project/cloister/virtcontainers/network"
)

func start(t *testing.T, id string, netns, root *os.File) *Thread {
	t.Helper()
	th, err := Start(id, netns, root)
	require.NoError(t, err)
	t.Cleanup(th.Close)
	return th
}

func TestThread(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("makes network namespaces: needs root")
	}
	netns, err := network.NewNetns()
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, netns.Close()) })
	dir := t.TempDir()
	root, err := OpenRoot(dir)
	require.NoError(t, err)
	defer root.Close()
	one, two := start(t, strings.Repeat("0123456789", 3), netns.File(), root), start(t, "two", netns.File(), root)
	require.NotEqual(t, one.TID(), two.TID())
	require.NotEqual(t, os.Getpid(), one.TID())
	left, err := os.ReadDir(dir)
	require.NoError(t, err)
	require.Empty(t, left)

	of := func(name string) string { return fmt.Sprintf("/proc/%d/%s", one.TID(), name) }
	comm, err := os.ReadFile(of("comm"))
	require.NoError(t, err)
	require.Equal(t, "012345678901234\n", string(comm))
	same := func(a, b string) bool {
		x, err := os.Stat(a)
		require.NoError(t, err)
		y, err := os.Stat(b)
		require.NoError(t, err)
		return os.SameFile(x, y)
	}
	require.True(t, same(of("ns/net"), netns.Path()))
	require.True(t, same(of("ns/pid"), "/proc/self/ns/pid"))
	require.False(t, same(of("ns/net"), "/proc/self/ns/net"))

	// Whoever takes its root for the container's finds nothing and writes nowhere.
	for _, root := range []string{of("root"), of("cwd")} {
		_, err = os.Stat(filepath.Join(root, "etc"))
		require.ErrorIs(t, err, os.ErrNotExist)
		require.ErrorIs(t, os.WriteFile(filepath.Join(root, "file"), nil, 0o600), os.ErrNotExist)
		require.ErrorIs(t, os.Mkdir(filepath.Join(root, "dir"), 0o700), os.ErrNotExist)
	}
	require.True(t, same("/proc/self/root", "/"), "this process keeps its own")

	one.Close()
	one.Close()
	require.Eventually(t, func() bool {
		_, err := os.Stat(of("ns"))
		return errors.Is(err, os.ErrNotExist)
	}, time.Minute, time.Millisecond)
	require.DirExists(t, fmt.Sprintf("/proc/%d/ns", two.TID()))
}

func TestStartThatFails(t *testing.T) {
	_, err := OpenRoot(filepath.Join(t.TempDir(), "missing"))
	require.ErrorIs(t, err, os.ErrNotExist)
	file, err := os.Open("/dev/null")
	require.NoError(t, err)
	defer file.Close()
	_, err = Start("c", file, file)
	require.ErrorContains(t, err, "enter network namespace")
}
