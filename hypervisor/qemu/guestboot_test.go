// SPDX-License-Identifier: Apache-2.0

package qemu

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
	"github.com/cloister-project/cloister/internal/procid"
)

func TestGuestBootsAndStops(t *testing.T) {
	d := testDriver(t)
	doc := testDocument(t, testKernel(t), testInitrd(t), "idle")
	start := time.Now()
	v := startGuest(t, d, doc)
	prepared := time.Since(start)

	// Nothing runs before Boot, and listeners can be bound.
	l, err := v.Vsock().Listen(1024)
	require.NoError(t, err)
	require.NoError(t, l.Close())
	console, _ := v.Logs.Console.Text()
	require.Empty(t, console)
	requireInherited(t, v)

	require.NoError(t, v.Boot(context.Background()))
	require.ErrorIs(t, v.Boot(context.Background()), errdefs.ErrFailedPrecondition)
	line := waitConsole(t, v, "INIT up")
	t.Logf("start %v, boot to init %v, guest says %q", prepared, time.Since(start)-prepared, line)

	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	require.NoError(t, v.Stop(ctx)) // this guest does not power off
	require.NoError(t, v.Stop(context.Background()))
	require.Equal(t, hypervisor.ExitStopped, v.Exit().Reason)
	require.Contains(t, v.Exit().Console, "INIT up")
	err = v.RemoveDisk(context.Background(), "none")
	require.ErrorIs(t, err, errdefs.ErrNotFound)
	err = v.AddDisk(context.Background(), testDisk(t, t.TempDir(), 1))
	require.ErrorIs(t, err, errdefs.ErrFailedPrecondition)
	require.ErrorContains(t, err, "stopped from outside")
	_, err = v.Vsock().Listen(1024)
	require.Error(t, err, "the transport is closed")
}

// requireInherited checks that QEMU has no file of this process but those it was given.
func requireInherited(t *testing.T, v *vm) {
	dir := fmt.Sprintf("/proc/%d/fd", v.PID())
	entries, err := os.ReadDir(dir)
	require.NoError(t, err)
	mine := map[string]bool{}
	own, err := os.ReadDir("/proc/self/fd")
	require.NoError(t, err)
	for _, e := range own {
		if to, err := os.Readlink("/proc/self/fd/" + e.Name()); err == nil {
			mine[to] = true
		}
	}
	for _, e := range entries {
		to, _ := os.Readlink(filepath.Join(dir, e.Name()))
		if strings.HasPrefix(to, "socket:") || strings.HasPrefix(to, "pipe:") || strings.HasPrefix(to, "/") && to != "/dev/null" {
			if e.Name() != "1" && e.Name() != "2" {
				require.False(t, mine[to], "fd %s of QEMU is this process's %s", e.Name(), to)
			}
		}
	}
}

func TestGuestPowersOff(t *testing.T) {
	v := startGuest(t, testDriver(t), testDocument(t, testKernel(t), testInitrd(t), "poweroff"))
	require.NoError(t, v.Boot(context.Background()))
	ctx, cancel := context.WithTimeout(context.Background(), bootTimeout)
	defer cancel()
	require.NoError(t, v.Stop(ctx))
	require.NoError(t, ctx.Err(), "it powered off by itself")
	require.Equal(t, hypervisor.ExitStopped, v.Exit().Reason, v.Exit().Error())
	require.Equal(t, "the guest powered off", v.Exit().Detail)
}

func TestGuestPanics(t *testing.T) {
	d := testDriver(t)
	for do, detail := range map[string]string{
		"panic": "Kernel panic - not syncing: sysrq triggered crash",
		"reset": "the guest reset itself, without a kernel panic on its console",
	} {
		t.Run(do, func(t *testing.T) {
			v := startGuest(t, d, testDocument(t, testKernel(t), testInitrd(t), do))
			require.NoError(t, v.Boot(context.Background()))
			exit := waitEnd(t, v)
			require.Equal(t, hypervisor.ExitGuestPanic, exit.Reason, exit.Error())
			require.Equal(t, detail, exit.Detail)
			require.NotEmpty(t, exit.Console)
		})
	}
}

// Without an init the kernel panics by itself.
func TestGuestWithoutInit(t *testing.T) {
	initrd := filepath.Join(t.TempDir(), "initrd")
	require.NoError(t, os.WriteFile(initrd, []byte("this is no archive"), 0o600))
	v := startGuest(t, testDriver(t), testDocument(t, testKernel(t), initrd, "idle"))
	require.NoError(t, v.Boot(context.Background()))
	exit := waitEnd(t, v)
	require.Equal(t, hypervisor.ExitGuestPanic, exit.Reason, exit.Error())
	require.Contains(t, exit.Detail, "VFS: Unable to mount root fs")
}

func TestQEMUKilled(t *testing.T) {
	d := testDriver(t)
	for signal, detail := range map[syscall.Signal]string{
		syscall.SIGKILL: "killed by signal 9",
		syscall.SIGTERM: "ended by a signal of somebody",
		syscall.SIGSEGV: "killed by signal 11",
	} {
		t.Run(signal.String(), func(t *testing.T) {
			v := startGuest(t, d, testDocument(t, testKernel(t), testInitrd(t), "idle"))
			require.NoError(t, v.Boot(context.Background()))
			require.NoError(t, syscall.Kill(v.PID(), signal))
			exit := waitEnd(t, v)
			require.Equal(t, hypervisor.ExitVMM, exit.Reason, exit.Error())
			require.Contains(t, exit.Detail, detail)
			require.ErrorIs(t, v.AddDisk(context.Background(), hypervisor.Disk{ID: "a", Serial: "a", Path: "/proc/version", ReadOnly: true}),
				errdefs.ErrInvalidArgument)
			image := filepath.Join(t.TempDir(), "image")
			require.NoError(t, os.WriteFile(image, make([]byte, 4096), 0o600))
			require.ErrorIs(t, v.AddDisk(context.Background(), hypervisor.Disk{ID: "a", Serial: "a", Path: image, ReadOnly: true}),
				errdefs.ErrFailedPrecondition)
			require.Equal(t, hypervisor.ExitVMM, v.Exit().Reason)
		})
	}
}

// QEMU ends with this process even if that is killed: a child of the test starts one and is killed.
func TestQEMUEndsWithItsParent(t *testing.T) {
	d := testDriver(t)
	kernel, initrd := testKernel(t), testInitrd(t)
	if os.Getenv("CLOISTER_TEST_CHILD") != "" {
		v := bootGuest(t, d, testDocument(t, kernel, initrd, "idle"))
		fmt.Printf("\nqemu=%d\n", v.PID())
		select {}
	}
	cmd := exec.Command(os.Args[0], "-test.run=^TestQEMUEndsWithItsParent$")
	cmd.Env = append(os.Environ(), "CLOISTER_TEST_CHILD=1", "TMPDIR="+t.TempDir())
	out, err := cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	var pid int
	buf, seen := make([]byte, 4096), ""
	for pid == 0 {
		n, err := out.Read(buf)
		require.NoError(t, err, seen)
		seen += string(buf[:n])
		if _, after, ok := strings.Cut(seen, "\nqemu="); ok && strings.Contains(after, "\n") {
			_, err := fmt.Sscan(after, &pid)
			require.NoError(t, err)
		}
	}
	require.NoError(t, syscall.Kill(pid, 0))
	require.NoError(t, cmd.Process.Kill())
	_ = cmd.Wait()
	require.Eventually(t, func() bool { return !procid.Alive(pid) }, 10*time.Second, 5*time.Millisecond)
}

func TestStartRefuses(t *testing.T) {
	d := testDriver(t)
	text := filepath.Join(t.TempDir(), "text")
	require.NoError(t, os.WriteFile(text, []byte(strings.Repeat("not a kernel\n", 100)), 0o600))
	kernel, initrd := testKernel(t), testInitrd(t)
	for name, tc := range map[string]struct {
		change func(*hypervisor.Document)
		is     error
		says   string
	}{
		"missing kernel":  {func(d *hypervisor.Document) { d.Boot.Kernel = "/nonexistent/vmlinux" }, os.ErrNotExist, "/nonexistent/vmlinux"},
		"wrong kernel":    {func(d *hypervisor.Document) { d.Boot.Kernel = text }, errdefs.ErrInvalidArgument, "not a kernel"},
		"missing initrd":  {func(d *hypervisor.Document) { d.Boot.Initrd = "/nonexistent/initrd" }, os.ErrNotExist, "/nonexistent/initrd"},
		"too much memory": {func(d *hypervisor.Document) { d.Memory.Bytes = 1 << 50 }, errdefs.ErrResourceExhausted, "the host has"},
		"unknown CPU":     {func(d *hypervisor.Document) { d.CPU.Model = "z80" }, nil, "unable to find CPU model 'z80'"},
		"missing disk": {func(d *hypervisor.Document) {
			d.Disks = []hypervisor.Disk{{ID: "a", Serial: "a", Path: "/nonexistent"}}
		}, os.ErrNotExist, "/nonexistent"},
		"tap not given": {func(d *hypervisor.Document) { d.NICs = []hypervisor.NIC{{ID: "eth0", MAC: "02:00:00:00:00:01"}} },
			errdefs.ErrInvalidArgument, "no tap"},
		"vhost not given":  {func(d *hypervisor.Document) { d.Vsock.Kind = hypervisor.VsockVhost }, errdefs.ErrInvalidArgument, "vhost-vsock"},
		"several mistakes": {func(d *hypervisor.Document) { d.ID, d.UUID = "../x", "y" }, errdefs.ErrInvalidArgument, "uuid"},
	} {
		t.Run(name, func(t *testing.T) {
			doc := testDocument(t, kernel, initrd, "idle")
			tc.change(&doc)
			dir := t.TempDir()
			_, err := d.Start(context.Background(), doc, hypervisor.Resources{StateDir: dir})
			require.ErrorContains(t, err, tc.says)
			if tc.is != nil {
				require.ErrorIs(t, err, tc.is)
			}
			left, err := os.ReadDir(dir)
			require.NoError(t, err)
			require.Empty(t, left)
		})
	}
}

func TestStartGivenUp(t *testing.T) {
	d := testDriver(t)
	doc := testDocument(t, testKernel(t), testInitrd(t), "idle")

	var pid int
	dir := t.TempDir()
	refuse := fmt.Errorf("no cgroup: %w", errdefs.ErrUnavailable)
	_, err := d.Start(context.Background(), doc, hypervisor.Resources{StateDir: dir, OnStart: func(p int) error { pid = p; return refuse }})
	require.ErrorIs(t, err, refuse)
	require.NotZero(t, pid)
	require.NoDirExists(t, fmt.Sprintf("/proc/%d", pid))

	ctx, cancel := context.WithCancel(context.Background())
	_, err = d.Start(ctx, doc, hypervisor.Resources{StateDir: dir, OnStart: func(p int) error { pid = p; cancel(); return nil }})
	require.ErrorIs(t, err, context.Canceled)
	require.NoDirExists(t, fmt.Sprintf("/proc/%d", pid))
	left, err := os.ReadDir(dir)
	require.NoError(t, err)
	require.Empty(t, left)
}

func TestNewRefuses(t *testing.T) {
	_, err := New(Config{Path: "/nonexistent/qemu"}).Capabilities(context.Background())
	require.ErrorIs(t, err, os.ErrNotExist)
	require.ErrorContains(t, err, "hypervisor.path")
	_, err = New(Config{Path: "/etc/passwd"}).Capabilities(context.Background())
	require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
	_, err = New(Config{Path: "/bin/true"}).Capabilities(context.Background())
	require.ErrorContains(t, err, "is it a QEMU")
	_, err = New(Config{Path: "/bin/ls"}).Capabilities(context.Background())
	require.ErrorContains(t, err, "it said")
}
