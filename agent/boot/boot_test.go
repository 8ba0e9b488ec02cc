// SPDX-License-Identifier: Apache-2.0

package boot

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
)

func TestInitOnlyAsPID1(t *testing.T) {
	_, err := Init(t.Context())
	require.ErrorContains(t, err, "PID 1")
}

func TestLoadList(t *testing.T) {
	list, err := parseLoadList(strings.NewReader("early vsock.ko\nlater scsi_mod.ko scan=manual x=1\n"))
	require.NoError(t, err)
	require.Equal(t, []listed{{"early", "vsock.ko", ""}, {"later", "scsi_mod.ko", "scan=manual x=1"}}, list)
	list, err = parseLoadList(strings.NewReader("confidential xts.ko\nsnp sev_guest.ko\ntdx tdx_guest.ko\nse uvdevice.ko\n"))
	require.NoError(t, err)
	require.Equal(t, "tdx", list[2].phase)
	list, err = parseLoadList(strings.NewReader(""))
	require.NoError(t, err)
	require.Empty(t, list)
	for _, bad := range []string{"vsock.ko", "soon vsock.ko", "early ", "early ../x.ko", "\n"} {
		_, err := parseLoadList(strings.NewReader(bad))
		require.Error(t, err, bad)
	}
	dir, err := os.OpenRoot(t.TempDir())
	require.NoError(t, err)
	defer dir.Close()
	_, err = readLoadList(dir)
	require.ErrorIs(t, err, os.ErrNotExist, "a missing list is not an empty one")
}

func TestRefuseMemory(t *testing.T) {
	path := filepath.Join(t.TempDir(), "auto_online_blocks")
	require.NoError(t, refuseMemory(path), "a kernel that takes none")
	require.NoFileExists(t, path)
	require.NoError(t, os.WriteFile(path, nil, 0o600))
	require.NoError(t, refuseMemory(path))
	got, err := os.ReadFile(path)
	require.NoError(t, err)
	require.Equal(t, "offline", string(got))
	require.Error(t, refuseMemory(filepath.Dir(path)), "what cannot be written is no kernel that takes none")
}

func TestSysctls(t *testing.T) {
	for key, want := range map[string]string{
		"net.ipv4.conf.eth0/1.arp_notify": "net/ipv4/conf/eth0.1/arp_notify",
		"kernel.sem":                      "kernel/sem",
		"fs.mqueue.msg_max":               "fs/mqueue/msg_max",
		"kernel.shm_rmid_forced":          "kernel/shm_rmid_forced",
		"kernel.msgmax":                   "kernel/msgmax",
	} {
		path, err := sysctlPath(key)
		require.NoError(t, err)
		require.Equal(t, want, path)
		require.NoError(t, checkSysctls(map[string]string{key: "1"}))
	}
	for _, key := range []string{
		"", ".", "net", "kernel.panic", "kernel.modules_disabled", "vm.overcommit_memory", "kernel.shm/../panic", "net...kernel.panic",
		"net./.x", "net.//.x", "net/ipv4/ip_forward", "kernel.shm.x", "fs.mqueue", "net.ipv4.x\x00", "net.é", "net." + strings.Repeat("a", 300),
	} {
		require.ErrorIs(t, checkSysctls(map[string]string{key: "1"}), errdefs.ErrInvalidArgument, key)
	}
	for _, value := range []string{"a\nb", "a\x00", strings.Repeat("1", maxSysctlValue+1)} {
		require.ErrorIs(t, checkSysctls(map[string]string{"net.core.somaxconn": value}), errdefs.ErrInvalidArgument)
	}
	many := map[string]string{}
	for i := range maxSysctls + 1 {
		many["net.a"+strings.Repeat("b", i%200)+strings.Repeat("c", i/200)] = ""
	}
	require.ErrorIs(t, checkSysctls(many), errdefs.ErrInvalidArgument)
}

func TestWriteSysctlStaysInItsTree(t *testing.T) {
	dir := t.TempDir()
	require.NoError(t, os.MkdirAll(filepath.Join(dir, "net"), 0o755))
	require.NoError(t, os.WriteFile(filepath.Join(dir, "net/a"), nil, 0o644))
	require.NoError(t, os.Symlink("/etc", filepath.Join(dir, "net/link")))
	tree, err := os.Open(dir)
	require.NoError(t, err)
	defer tree.Close()
	require.NoError(t, writeSysctl(tree, "net.a", "5"))
	text, err := os.ReadFile(filepath.Join(dir, "net/a"))
	require.NoError(t, err)
	require.Equal(t, "5", string(text))
	require.ErrorIs(t, writeSysctl(tree, "net.b", "5"), os.ErrNotExist)
	require.Error(t, writeSysctl(tree, "net.link.hostname", "5"))
}

func TestHostname(t *testing.T) {
	for _, good := range []string{"a", "pod-1", "a.b.c", "Pod_1", strings.Repeat("a", 64)} {
		require.NoError(t, checkHostname(good))
	}
	for _, bad := range []string{"", "-a", ".a", "a b", "a\n", "é", strings.Repeat("a", 65)} {
		require.ErrorIs(t, checkHostname(bad), errdefs.ErrInvalidArgument, bad)
	}
}

func TestClockRefusesNonsense(t *testing.T) {
	var s System
	for _, at := range []int64{-1, 0, time.Date(2019, 1, 1, 0, 0, 0, 0, time.UTC).UnixNano(), 1<<63 - 1} {
		require.ErrorIs(t, s.SetClock(at), errdefs.ErrInvalidArgument)
	}
}

func TestTimeline(t *testing.T) {
	var s System
	s.mark("a")
	s.mark("b")
	marks := s.Timeline()
	require.Equal(t, []string{"a", "b"}, []string{marks[0].GetName(), marks[1].GetName()})
	require.NotZero(t, marks[0].GetMicros())
	require.LessOrEqual(t, marks[0].GetMicros(), marks[1].GetMicros())
	marks[0].Name = "changed"
	require.Equal(t, "a", s.Timeline()[0].GetName(), "the caller has a copy")
}

func TestCgroups(t *testing.T) {
	root := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(root, "cgroup.controllers"), []byte("cpu memory pids\n"), 0o644))
	require.NoError(t, setupCgroups(root))
	for file, want := range map[string]string{
		"cgroup.subtree_control": "+cpu +memory +pids ", "pod/cgroup.subtree_control": "+cpu +memory +pids ", "agent/cgroup.procs": "0",
	} {
		got, err := os.ReadFile(filepath.Join(root, file))
		require.NoError(t, err, file)
		require.Equal(t, want, string(got), file)
	}
}

func TestUserProcesses(t *testing.T) {
	cmd := exec.Command("sleep", "60")
	require.NoError(t, cmd.Start())
	require.Contains(t, userProcesses(), cmd.Process.Pid)
	require.NotContains(t, userProcesses(), os.Getpid())
	require.NoError(t, cmd.Process.Kill())
	require.Error(t, cmd.Wait())
	require.NotContains(t, userProcesses(), cmd.Process.Pid)
}

func FuzzSysctlPath(f *testing.F) {
	for _, seed := range []string{"net.ipv4.ip_forward", "net.ipv4.conf.eth0/1.x", "net.../", "kernel.shm/.."} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, key string) {
		if path, err := sysctlPath(key); err == nil {
			require.True(t, filepath.IsLocal(path), path)
			require.Equal(t, filepath.Clean(path), path)
		}
	})
}
