// SPDX-License-Identifier: Apache-2.0

package contract

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/cloister-project/cloister/hypervisor"
	"github.com/cloister-project/cloister/hypervisor/vmtest"
)

// requireNoStart starts a VM that cannot be, and checks that nothing is left of it, not even what it was given.
func (m machine) requireNoStart(ctx context.Context, t *testing.T, doc hypervisor.Document, onStart func(int) error) error {
	t.Helper()
	check := nothingLeft(t)
	given, other, err := os.Pipe()
	require.NoError(t, err)
	defer other.Close()
	dir := vmtest.StateDir(t)
	v, err := m.Start(ctx, doc, hypervisor.Resources{StateDir: dir, Taps: map[string]*os.File{"given": given}, OnStart: onStart})
	if err == nil {
		v.Kill()
	}
	require.Error(t, err)
	require.ErrorIs(t, given.Close(), os.ErrClosed, "it took it over")
	require.NoError(t, other.Close())
	left, e := os.ReadDir(dir)
	require.NoError(t, e)
	require.Empty(t, left)
	check()
	return err
}

func TestStartRefuses(t *testing.T) {
	m := newMachine(t)
	text := filepath.Join(t.TempDir(), "text")
	require.NoError(t, os.WriteFile(text, []byte(strings.Repeat("no such thing\n", 100)), 0o600))
	boot := m.document(t, "idle").Boot
	for name, tc := range map[string]struct {
		change func(*hypervisor.Document)
		is     error
		says   string
	}{
		"missing kernel":  {func(d *hypervisor.Document) { d.Boot.Kernel = "/nonexistent/vmlinux" }, os.ErrNotExist, "/nonexistent/vmlinux"},
		"wrong kernel":    {func(d *hypervisor.Document) { d.Boot.Kernel = text }, errdefs.ErrInvalidArgument, "not a kernel"},
		"missing initrd":  {func(d *hypervisor.Document) { d.Boot.Initrd = "/nonexistent/initrd" }, os.ErrNotExist, "/nonexistent/initrd"},
		"too much memory": {func(d *hypervisor.Document) { d.Memory.Bytes = 1 << 50 }, errdefs.ErrResourceExhausted, "the host has"},
		"missing disk": {func(d *hypervisor.Document) {
			d.Disks = []hypervisor.Disk{{ID: "a", Serial: "a", Path: "/nonexistent"}}
		}, os.ErrNotExist, "/nonexistent"},
		"no places for disks": {func(d *hypervisor.Document) {
			for i := range 5000 {
				d.Disks = append(d.Disks, hypervisor.Disk{ID: fmt.Sprint("d", i), Serial: fmt.Sprint("s", i), Path: text})
			}
		}, errdefs.ErrInvalidArgument, "5000 disks"},
		"tap not given": {func(d *hypervisor.Document) { d.NICs = []hypervisor.NIC{{ID: "eth0", MAC: "02:00:00:00:00:01"}} },
			errdefs.ErrInvalidArgument, "no tap"},
		"unknown vsock":    {func(d *hypervisor.Document) { d.Vsock.Kind = "pigeon" }, errdefs.ErrInvalidArgument, "pigeon"},
		"several mistakes": {func(d *hypervisor.Document) { d.ID, d.UUID = "../x", "y" }, errdefs.ErrInvalidArgument, "uuid"},
	} {
		t.Run(name, func(t *testing.T) {
			doc := vmtest.Document(m, m.accel, boot.Kernel, boot.Initrd, "idle")
			tc.change(&doc)
			err := m.requireNoStart(context.Background(), t, doc, nil)
			require.ErrorContains(t, err, tc.says)
			require.ErrorIs(t, err, tc.is)
		})
	}
}

func TestStartGivenUp(t *testing.T) {
	m := newMachine(t)
	doc := m.document(t, "idle")
	pid := 0

	refuse := fmt.Errorf("no cgroup: %w", errdefs.ErrUnavailable)
	err := m.requireNoStart(context.Background(), t, doc, func(p int) error { pid = p; return refuse })
	require.ErrorIs(t, err, refuse)
	require.NotZero(t, pid)
	require.NoDirExists(t, fmt.Sprintf("/proc/%d", pid))

	ctx, cancel := context.WithCancel(context.Background())
	pid = 0
	err = m.requireNoStart(ctx, t, doc, func(p int) error { pid = p; cancel(); return nil })
	require.ErrorIs(t, err, context.Canceled)
	require.NotZero(t, pid)
	require.NoDirExists(t, fmt.Sprintf("/proc/%d", pid))

	pid = 0
	err = m.requireNoStart(ctx, t, doc, func(p int) error { pid = p; return nil })
	require.ErrorIs(t, err, context.Canceled)
	require.Zero(t, pid, "nothing was started")
}

// The VMM runs in the network namespace it is given, and nothing of this process does.
func TestStartInNetNS(t *testing.T) {
	m := newMachine(t)
	ns, tap := vmtest.NetNS(t)
	doc := m.document(t, "idle")
	doc.NICs = []hypervisor.NIC{{ID: "eth0", MAC: "02:00:00:00:00:01", MTU: 1400}}
	before, err := os.Readlink("/proc/self/ns/net")
	require.NoError(t, err)

	v := vmtest.Start(t, m, doc, hypervisor.Resources{NetNS: ns, Taps: map[string]*os.File{"eth0": tap}})
	var want unix.Stat_t
	require.NoError(t, unix.Fstat(int(ns.Fd()), &want))
	got, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/net", v.PID()))
	require.NoError(t, err)
	require.Equal(t, fmt.Sprintf("net:[%d]", want.Ino), got)
	require.ErrorIs(t, tap.Close(), os.ErrClosed, "Start took it over")
	after, err := os.Readlink("/proc/self/ns/net")
	require.NoError(t, err)
	require.Equal(t, before, after)

	// There is no guest to wait for: it was never booted.
	require.NoError(t, v.Stop(context.Background()))
	require.Equal(t, hypervisor.ExitStopped, v.Exit().Reason, v.Exit().Error())
	require.Eventually(t, func() bool {
		tasks, err := os.ReadDir("/proc/self/task")
		require.NoError(t, err)
		for _, task := range tasks {
			if to, _ := os.Readlink("/proc/self/task/" + task.Name() + "/ns/net"); to == got {
				return false
			}
		}
		return true
	}, 10*time.Second, time.Millisecond)
}
