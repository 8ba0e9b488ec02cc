// SPDX-License-Identifier: Apache-2.0

package contract

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"

	"github.com/cloister-project/cloister/hypervisor"
	"github.com/cloister-project/cloister/hypervisor/supervise"
	"github.com/cloister-project/cloister/hypervisor/vmtest"
	"github.com/cloister-project/cloister/internal/procid"
)

func TestBootsAndStops(t *testing.T) {
	m, ctx := newMachine(t), context.Background()
	doc := m.document(t, "idle")
	disk := vmtest.Disk(t, t.TempDir(), 0)
	doc.Disks = []hypervisor.Disk{disk}
	check := nothingLeft(t)
	start := time.Now()
	v := m.start(t, doc)
	prepared := time.Since(start)

	// Nothing runs before Boot, and listeners can be bound.
	l, err := v.Vsock().Listen(1024)
	require.NoError(t, err)
	_, err = v.Vsock().Listen(1024)
	require.ErrorIs(t, err, errdefs.ErrAlreadyExists)
	require.NoError(t, l.Close())
	console, err := os.ReadFile(filepath.Join(v.StateDir, supervise.ConsoleLog))
	require.NoError(t, err)
	require.Empty(t, console)
	require.Zero(t, v.Exit())
	requireInherited(t, v)

	require.NoError(t, v.Boot(ctx))
	require.ErrorIs(t, v.Boot(ctx), errdefs.ErrFailedPrecondition)
	line := v.WaitConsole(t, "INIT up")
	t.Logf("start %v, boot to init %v, guest says %q", prepared, time.Since(start)-prepared, line)

	brief, cancel := context.WithTimeout(ctx, 50*time.Millisecond)
	defer cancel()
	require.NoError(t, v.Stop(brief)) // this guest does not power off
	require.Contains(t, v.Exit().Console, "INIT up")
	require.Contains(t, v.Exit().Detail, "stopped from outside")
	requireEnded(t, v, disk, hypervisor.ExitStopped)
	require.NoDirExists(t, fmt.Sprintf("/proc/%d", v.PID()))
	check()
}

// requireInherited checks that the VMM has no file of this process but those it was given.
func requireInherited(t *testing.T, v *vmtest.VM) {
	t.Helper()
	mine := openFiles(t)
	dir := fmt.Sprintf("/proc/%d/fd", v.PID())
	entries, err := os.ReadDir(dir)
	require.NoError(t, err)
	require.NotEmpty(t, entries)
	for _, e := range entries {
		to, _ := os.Readlink(filepath.Join(dir, e.Name()))
		if strings.HasPrefix(to, "socket:") || strings.HasPrefix(to, "pipe:") || strings.HasPrefix(to, "/") && to != "/dev/null" {
			if e.Name() != "1" && e.Name() != "2" {
				require.Zero(t, mine[to], "fd %s of the VMM is this process's %s", e.Name(), to)
			}
		}
	}
}

func TestPowersOff(t *testing.T) {
	m := newMachine(t)
	v := m.start(t, m.document(t, "poweroff"))
	require.NoError(t, v.Boot(context.Background()))
	ctx, cancel := context.WithTimeout(context.Background(), vmtest.Timeout)
	defer cancel()
	require.NoError(t, v.Stop(ctx))
	require.NoError(t, ctx.Err(), "it powered off by itself")
	require.Equal(t, hypervisor.ExitStopped, v.Exit().Reason, v.Exit().Error())
	require.Equal(t, "the guest powered off", v.Exit().Detail)
}

func TestPanics(t *testing.T) {
	m := newMachine(t)
	for do, detail := range map[string]string{
		"panic": "Kernel panic - not syncing: sysrq triggered crash",
		"reset": "the guest reset itself, without a kernel panic on its console",
	} {
		t.Run(do, func(t *testing.T) {
			v := m.start(t, m.document(t, do))
			require.NoError(t, v.Boot(context.Background()))
			exit := v.WaitEnd(t)
			require.Equal(t, hypervisor.ExitGuestPanic, exit.Reason, exit.Error())
			require.Equal(t, detail, exit.Detail)
			require.NotEmpty(t, exit.Console)
		})
	}
}

// Without an init the kernel panics by itself.
func TestWithoutInit(t *testing.T) {
	m := newMachine(t)
	doc := m.document(t, "idle")
	doc.Boot.Initrd = filepath.Join(t.TempDir(), "initrd")
	require.NoError(t, os.WriteFile(doc.Boot.Initrd, []byte("this is no archive"), 0o600))
	v := m.start(t, doc)
	require.NoError(t, v.Boot(context.Background()))
	exit := v.WaitEnd(t)
	require.Equal(t, hypervisor.ExitGuestPanic, exit.Reason, exit.Error())
	require.Contains(t, exit.Detail, "VFS: Unable to mount root fs")
}

func TestVMMKilled(t *testing.T) {
	m := newMachine(t)
	for signal, detail := range map[syscall.Signal]string{
		syscall.SIGKILL: "killed by signal 9",
		syscall.SIGSEGV: "killed by signal 11",
	} {
		t.Run(signal.String(), func(t *testing.T) {
			doc := m.document(t, "idle")
			disk := vmtest.Disk(t, t.TempDir(), 0)
			doc.Disks = []hypervisor.Disk{disk}
			v := m.start(t, doc)
			require.NoError(t, v.Boot(context.Background()))
			require.NoError(t, syscall.Kill(v.PID(), signal))
			require.Contains(t, v.WaitEnd(t).Detail, detail)
			requireEnded(t, v, disk, hypervisor.ExitVMM)
		})
	}
}

// The VMM ends with this process even if that is killed: a child of the test starts one and is killed.
func TestVMMEndsWithItsParent(t *testing.T) {
	const child = "CLOISTER_TEST_CHILD"
	m := newMachine(t)
	doc := m.document(t, "idle")
	if os.Getenv(child) != "" {
		v := vmtest.Boot(t, m, doc)
		fmt.Printf("\nvmm=%d\n", v.PID())
		select {}
	}
	cmd := exec.Command(os.Args[0], "-test.run=^"+t.Name()+"$")
	cmd.Env = append(os.Environ(), child+"=1", "TMPDIR="+t.TempDir())
	out, err := cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	var pid int
	buf, seen := make([]byte, 4096), ""
	for pid == 0 {
		n, err := out.Read(buf)
		require.NoError(t, err, seen)
		seen += string(buf[:n])
		if _, after, ok := strings.Cut(seen, "\nvmm="); ok && strings.Contains(after, "\n") {
			_, err := fmt.Sscan(after, &pid)
			require.NoError(t, err)
		}
	}
	require.True(t, procid.Alive(pid))
	require.NoError(t, cmd.Process.Kill())
	_ = cmd.Wait()
	require.Eventually(t, func() bool { return !procid.Alive(pid) }, 10*time.Second, 5*time.Millisecond)
}
