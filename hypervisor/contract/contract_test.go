// SPDX-License-Identifier: Apache-2.0

package contract

import (
	"cmp"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/cloister-project/cloister/hypervisor"
	"github.com/cloister-project/cloister/hypervisor/vmm"
	"github.com/cloister-project/cloister/hypervisor/vmtest"
)

const (
	vmmVariable = "CLOISTER_TEST_VMM"
	qemu        = "qemu"
)

func TestMain(m *testing.M) { vmtest.Main(m) }

// machine is what the tests of one run start VMs with.
type machine struct {
	hypervisor.Driver
	accel hypervisor.Accelerator
}

// newMachine returns the driver of CLOISTER_TEST_VMM, with its binary found.
func newMachine(t testing.TB) machine {
	t.Helper()
	kind := cmp.Or(os.Getenv(vmmVariable), qemu)
	require.Contains(t, vmm.Kinds(), kind, vmmVariable)
	c := vmm.Config{Kind: kind, Arch: hypervisor.ArchAMD64, CacheDir: vmtest.CacheDir(t)}
	unset := hypervisor.AccelKVM
	if kind == qemu {
		c.Path, unset = os.Getenv("CLOISTER_TEST_QEMU"), hypervisor.AccelTCG
	}
	d, err := vmm.New(c)
	require.NoError(t, err)
	if _, err := d.Binary(); errors.Is(err, errdefs.ErrNotFound) {
		t.Skipf("%s=%s: %v", vmmVariable, kind, err)
	}
	accel := vmtest.Accelerator(t, unset)
	if _, err := d.Accelerator(context.Background(), string(accel)); err != nil {
		// QEMU can do without KVM, so that who asks for it means it.
		if kind != qemu && errors.Is(err, errdefs.ErrUnavailable) {
			t.Skipf("%s=%s: %v", vmmVariable, kind, err)
		}
		require.NoError(t, err)
	}
	return machine{d, accel}
}

// document describes a VM whose init does what do says.
func (m machine) document(t testing.TB, do string, modules ...string) hypervisor.Document {
	t.Helper()
	const arch = hypervisor.ArchAMD64
	return vmtest.Document(m, m.accel, vmtest.Kernel(t, arch), vmtest.Initrd(t, arch, modules...), do)
}

// start starts a VM without booting it.
func (m machine) start(t testing.TB, doc hypervisor.Document) *vmtest.VM {
	t.Helper()
	return vmtest.Start(t, m, doc, hypervisor.Resources{})
}

// requireEnded checks that the methods of a VM that has ended answer with the reason. disk is one that it had at boot.
func requireEnded(t *testing.T, v *vmtest.VM, disk hypervisor.Disk, reason hypervisor.ExitReason) {
	t.Helper()
	ctx := context.Background()
	require.Equal(t, reason, v.Exit().Reason, v.Exit().Error())
	for name, err := range map[string]error{
		"Boot":               v.Boot(ctx),
		"AddDisk":            v.AddDisk(ctx, vmtest.Disk(t, t.TempDir(), 99)),
		"RemoveDisk":         v.RemoveDisk(ctx, disk.ID),
		"AddSharedDirectory": v.AddSharedDirectory(ctx, hypervisor.SharedDirectory{ID: "late", Tag: "late", Socket: "/nonexistent/socket"}),
	} {
		require.ErrorIs(t, err, errdefs.ErrFailedPrecondition, name)
		var exit hypervisor.Exit
		require.ErrorAs(t, err, &exit, name)
		require.Equal(t, v.Exit(), exit, name)
	}
	_, err := v.Vsock().Listen(1024)
	require.Error(t, err, "the transport is closed")
	_, err = v.Vsock().Dial(ctx, 1025)
	require.Error(t, err, "the transport is closed")

	require.NoError(t, v.Stop(ctx))
	v.Kill()
	require.Equal(t, reason, v.Exit().Reason, "the end is settled once")
}

// nothingLeft returns a check that this process has no more goroutines, open files and children than now.
func nothingLeft(t *testing.T) (check func()) {
	t.Helper()
	goroutines, files, processes := goleak.IgnoreCurrent(), openFiles(t), children(t)
	return func() {
		t.Helper()
		require.NoError(t, goleak.Find(goroutines))
		for file, n := range openFiles(t) {
			require.LessOrEqual(t, n, files[file], "open files %s", file)
		}
		for pid, name := range children(t) {
			require.Contains(t, processes, pid, "process %s", name)
		}
	}
}

// openFiles counts what is behind this process's file descriptors.
func openFiles(t testing.TB) map[string]int {
	t.Helper()
	names, err := os.ReadDir("/proc/self/fd")
	require.NoError(t, err)
	files := map[string]int{}
	for _, name := range names {
		file, err := os.Readlink("/proc/self/fd/" + name.Name())
		// Go's runtime opens two of its own once.
		if err == nil && file != "anon_inode:[eventpoll]" && file != "anon_inode:[eventfd]" {
			files[file]++
		}
	}
	return files
}

// children are the processes whose parent this one is, zombies too.
func children(t testing.TB) map[int]string {
	t.Helper()
	paths, err := filepath.Glob("/proc/[0-9]*/stat")
	require.NoError(t, err)
	found := map[int]string{}
	for _, path := range paths {
		b, err := os.ReadFile(path)
		if err != nil {
			continue // it is gone meanwhile
		}
		i := strings.LastIndexByte(string(b), ')')
		fields := strings.Fields(string(b[i+1:])) // state, parent, …; see proc_pid_stat(5)
		if len(fields) > 1 && fields[1] == strconv.Itoa(os.Getpid()) {
			pid, err := strconv.Atoi(filepath.Base(filepath.Dir(path)))
			require.NoError(t, err)
			found[pid] = string(b[:i+1])
		}
	}
	return found
}
