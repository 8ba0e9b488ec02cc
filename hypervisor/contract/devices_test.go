// SPDX-License-Identifier: Apache-2.0

package contract

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"

	"github.com/cloister-project/cloister/hypervisor"
	"github.com/cloister-project/cloister/hypervisor/vmtest"
	"github.com/cloister-project/cloister/hypervisor/vsock"
)

// TestDevices looks from inside a guest at every device but shared directories, and has disks come and go.
func TestDevices(t *testing.T) {
	m, ctx := newMachine(t), context.Background()
	ns, tap := vmtest.NetNS(t)
	dir := t.TempDir()
	var disks []hypervisor.Disk
	for i := range 33 {
		disks = append(disks, vmtest.Disk(t, dir, i))
	}
	doc := m.document(t, "devices", vmtest.DeviceModules...)
	doc.NICs = []hypervisor.NIC{{ID: "eth0", MAC: "02:00:00:00:00:01", MTU: 1400}}
	doc.Disks = disks[:2]
	v := vmtest.Start(t, m, doc, hypervisor.Resources{NetNS: ns, Taps: map[string]*os.File{"eth0": tap}})
	heard := v.Greet(t)
	require.NoError(t, v.AddDisk(ctx, disks[2]), "before the guest runs")
	require.NoError(t, v.Boot(ctx))

	require.Equal(t, "NICS 02:00:00:00:00:01/1400.", v.WaitConsole(t, "NICS "))
	require.Equal(t, "VSOCK hello.", v.WaitConsole(t, "VSOCK "))
	require.Equal(t, "I am amd64", <-heard)
	requireAnswers(ctx, t, v)
	requireHotPlug(ctx, t, v, disks)
}

// requireAnswers connects to the guest, which has greeted.
func requireAnswers(ctx context.Context, t *testing.T, v *vmtest.VM) {
	t.Helper()
	require.Equal(t, "LISTEN <nil>.", v.WaitConsole(t, "LISTEN "))
	ctx, cancel := context.WithTimeout(ctx, vmtest.Timeout)
	defer cancel()
	for _, words := range []string{"one", "two"} {
		conn, err := v.Vsock().Dial(ctx, 1025)
		require.NoError(t, err)
		defer conn.Close()
		_, err = conn.Write([]byte(words))
		require.NoError(t, err)
		answer, err := io.ReadAll(conn)
		require.NoError(t, err)
		require.Equal(t, "heard "+words, string(answer))
	}
	_, err := v.Vsock().Dial(ctx, 1026)
	require.ErrorIs(t, err, vsock.ErrRefused)
}

// requireHotPlug has all but the first three disks come and go, and these then too.
func requireHotPlug(ctx context.Context, t *testing.T, v *vmtest.VM, disks []hypervisor.Disk) {
	t.Helper()
	v.WaitConsole(t, vmtest.DisksLine(disks[:3]))
	start := time.Now()
	for _, disk := range disks[3:] {
		require.NoError(t, v.AddDisk(ctx, disk))
	}
	added := time.Since(start)
	v.WaitConsole(t, vmtest.DisksLine(disks))
	t.Logf("30 disks: added in %v, all readable in the guest after %v", added, time.Since(start))

	require.ErrorIs(t, v.AddDisk(ctx, disks[4]), errdefs.ErrAlreadyExists)
	again := disks[4]
	again.ID = "other"
	require.ErrorIs(t, v.AddDisk(ctx, again), errdefs.ErrAlreadyExists, "the serial is taken")
	again.Serial, again.Path = "other", "/nonexistent/image"
	require.ErrorIs(t, v.AddDisk(ctx, again), os.ErrNotExist)
	again.ID = "no/id"
	require.ErrorIs(t, v.AddDisk(ctx, again), errdefs.ErrInvalidArgument)
	require.ErrorIs(t, v.RemoveDisk(ctx, "other"), errdefs.ErrNotFound, "nothing is kept of what failed")

	start = time.Now()
	var wg sync.WaitGroup
	errs := make([]error, len(disks))
	for i := 3; i < len(disks); i++ {
		wg.Go(func() { errs[i] = v.RemoveDisk(ctx, disks[i].ID) })
	}
	wg.Wait()
	require.NoError(t, errors.Join(errs...))
	t.Logf("30 disks: removed in %v", time.Since(start))
	v.WaitConsole(t, vmtest.DisksLine(disks[:3]))
	for _, disk := range disks[3:] {
		v.RequireClosed(t, disk.Path)
	}

	// The places can be used again, also those of disks that were there at boot.
	for _, disk := range disks[:3] {
		require.NoError(t, v.RemoveDisk(ctx, disk.ID))
		v.RequireClosed(t, disk.Path)
	}
	v.WaitConsole(t, "DISKS 0: .")
	start = time.Now()
	require.NoError(t, v.AddDisk(ctx, disks[0]))
	v.WaitConsoleAfter(t, "DISKS 0", vmtest.DisksLine(disks[:1]))
	t.Logf("1 disk: readable in the guest after %v", time.Since(start))
	for _, disk := range disks[1:3] {
		require.NoError(t, v.AddDisk(ctx, disk))
	}
	v.WaitConsoleAfter(t, "DISKS 0", vmtest.DisksLine(disks[:3]))
}

func TestSharedDirectories(t *testing.T) {
	virtiofsd := os.Getenv("CLOISTER_TEST_VIRTIOFSD")
	if virtiofsd == "" {
		virtiofsd = "/usr/libexec/virtiofsd"
	}
	if _, err := os.Stat(virtiofsd); err != nil {
		t.Skipf("no virtiofsd (CLOISTER_TEST_VIRTIOFSD is its path): %v", err)
	}
	m, ctx := newMachine(t), context.Background()
	v := vmtest.Boot(t, m, m.document(t, "directories"))
	v.WaitConsole(t, "DIRECTORIES 0")

	nobody := hypervisor.SharedDirectory{ID: "x", Tag: "x", Socket: "/nonexistent/socket"}
	require.ErrorContains(t, v.AddSharedDirectory(ctx, nobody), "/nonexistent/socket")
	for i := range 2 {
		directory := hypervisor.SharedDirectory{ID: fmt.Sprint(i), Tag: fmt.Sprint("tag", i), Socket: startVirtiofsd(t, virtiofsd)}
		start := time.Now()
		require.NoError(t, v.AddSharedDirectory(ctx, directory))
		added := time.Since(start)
		v.WaitConsole(t, fmt.Sprintf("DIRECTORIES %d", i+1))
		t.Logf("shared directory: added in %v, its driver is bound in the guest after %v", added, time.Since(start))
		require.ErrorIs(t, v.AddSharedDirectory(ctx, directory), errdefs.ErrAlreadyExists)
	}
	require.ErrorIs(t, v.AddSharedDirectory(ctx, nobody), errdefs.ErrResourceExhausted)
}

func startVirtiofsd(t *testing.T, path string) (socket string) {
	dir := t.TempDir()
	socket = filepath.Join(dir, "s")
	cmd := exec.Command(path, "--socket-path="+socket, "-o", "source="+dir, "-o", "sandbox=chroot")
	require.NoError(t, cmd.Start())
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	require.Eventually(t, func() bool { _, err := os.Stat(socket); return err == nil }, 5*time.Second, time.Millisecond)
	return socket
}
