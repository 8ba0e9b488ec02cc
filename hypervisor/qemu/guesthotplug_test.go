// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"

	"github.com/cloister-project/cloister/hypervisor"
)

// testDisk makes an image whose first bytes are its number.
func testDisk(t testing.TB, dir string, i int) hypervisor.Disk {
	t.Helper()
	d := hypervisor.Disk{
		ID:       fmt.Sprintf("layer-%d", i),
		Serial:   fmt.Sprintf("serial_%03d", i),
		Path:     filepath.Join(dir, fmt.Sprintf("image,%d", i)), // a comma must not matter
		ReadOnly: i%2 == 0,
	}
	image := make([]byte, 1<<20)
	copy(image, fmt.Sprintf("d%d", i))
	require.NoError(t, os.WriteFile(d.Path, image, 0o600))
	return d
}

// expectedDisks is the line that testdata/init prints.
func expectedDisks(disks []hypervisor.Disk) string {
	var s []string
	for _, d := range disks {
		ro := "0"
		if d.ReadOnly {
			ro = "1"
		}
		s = append(s, d.Serial+"=d"+strings.TrimPrefix(d.ID, "layer-")+"/"+ro)
	}
	slices.Sort(s)
	return fmt.Sprintf("DISKS %d: %s.", len(s), strings.Join(s, ","))
}

func TestGuestDisks(t *testing.T) {
	d := testDriver(t)
	dir, ctx := t.TempDir(), context.Background()
	var disks []hypervisor.Disk
	for i := range 33 {
		disks = append(disks, testDisk(t, dir, i))
	}
	doc := testDocument(t, testKernel(t), testInitrd(t, scsiModules...), "disks")
	doc.Disks = disks[:2]
	v := startGuest(t, d, doc)
	require.NoError(t, v.AddDisk(ctx, disks[2])) // before the guest runs
	require.NoError(t, v.Boot(ctx))
	waitConsole(t, v, expectedDisks(disks[:3]))

	start := time.Now()
	for _, disk := range disks[3:] {
		require.NoError(t, v.AddDisk(ctx, disk))
	}
	added := time.Since(start)
	waitConsole(t, v, expectedDisks(disks))
	t.Logf("30 disks: added in %v, all readable in the guest after %v", added, time.Since(start))

	require.ErrorIs(t, v.AddDisk(ctx, disks[4]), errdefs.ErrAlreadyExists)
	again := disks[4]
	again.ID = "other"
	require.ErrorIs(t, v.AddDisk(ctx, again), errdefs.ErrAlreadyExists, "the serial is taken")
	require.ErrorIs(t, v.RemoveDisk(ctx, "other"), errdefs.ErrNotFound)
	again.Serial = "other"
	again.Path = disks[5].Path
	again.ReadOnly = false
	err := v.AddDisk(ctx, again)
	require.ErrorContains(t, err, "lock", "a writable image is one disk's alone")

	start = time.Now()
	var wg sync.WaitGroup
	errs := make([]error, len(disks))
	for i := 3; i < len(disks); i++ {
		wg.Go(func() { errs[i] = v.RemoveDisk(ctx, disks[i].ID) })
	}
	wg.Wait()
	for _, err := range errs {
		require.NoError(t, err)
	}
	t.Logf("30 disks: removed in %v", time.Since(start))
	waitConsole(t, v, expectedDisks(disks[:3]))
	for _, disk := range disks[3:] {
		require.NoError(t, os.Remove(disk.Path))
		requireClosed(t, v, disk.Path)
	}

	// The places can be used again, also those of disks that were there at boot.
	for _, disk := range disks[:3] {
		require.NoError(t, v.RemoveDisk(ctx, disk.ID))
	}
	waitConsole(t, v, "DISKS 0: .")
	start = time.Now()
	require.NoError(t, v.AddDisk(ctx, disks[0]))
	waitConsoleAfter(t, v, "DISKS 0", expectedDisks(disks[:1]))
	t.Logf("1 disk: readable in the guest after %v", time.Since(start))
	for _, disk := range disks[1:3] {
		require.NoError(t, v.AddDisk(ctx, disk))
	}
	waitConsoleAfter(t, v, "DISKS 0", expectedDisks(disks[:3]))
}

func requireClosed(t *testing.T, v *vm, path string) {
	fds, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", v.PID()))
	require.NoError(t, err)
	for _, fd := range fds {
		to, _ := os.Readlink(fd)
		require.NotContains(t, to, path)
	}
}

func TestManyDisks(t *testing.T) {
	// Without booting: QEMU's side of more disks than one target each.
	d := testDriver(t)
	dir, ctx := t.TempDir(), context.Background()
	v := startGuest(t, d, testDocument(t, testKernel(t), testInitrd(t), "idle"))
	start := time.Now()
	for i := range 300 {
		require.NoError(t, v.AddDisk(ctx, testDisk(t, dir, i*2)))
	}
	t.Logf("300 disks: added in %v", time.Since(start))
	start = time.Now()
	for i := range 300 {
		require.NoError(t, v.RemoveDisk(ctx, fmt.Sprintf("layer-%d", i*2)))
	}
	t.Logf("300 disks: removed in %v", time.Since(start))
}

func TestGuestSharedDirectories(t *testing.T) {
	virtiofsd := os.Getenv("CLOISTER_TEST_VIRTIOFSD")
	if virtiofsd == "" {
		virtiofsd = "/usr/libexec/virtiofsd"
	}
	if _, err := os.Stat(virtiofsd); err != nil {
		t.Skipf("no virtiofsd (CLOISTER_TEST_VIRTIOFSD is its path): %v", err)
	}
	d := testDriver(t)
	v := bootGuest(t, d, testDocument(t, testKernel(t), testInitrd(t), "directories"))
	waitConsole(t, v, "DIRECTORIES 0")
	ctx := context.Background()

	nobody := hypervisor.SharedDirectory{ID: "x", Tag: "x", Socket: "/nonexistent/socket"}
	require.ErrorContains(t, v.AddSharedDirectory(ctx, nobody), "/nonexistent/socket")
	for i := range 2 {
		socket := startVirtiofsd(t, virtiofsd)
		start := time.Now()
		require.NoError(t, v.AddSharedDirectory(ctx, hypervisor.SharedDirectory{ID: fmt.Sprint(i), Tag: fmt.Sprint("tag", i), Socket: socket}))
		added := time.Since(start)
		waitConsole(t, v, fmt.Sprintf("DIRECTORIES %d", i+1))
		t.Logf("shared directory: added in %v, its driver is bound in the guest after %v", added, time.Since(start))
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
