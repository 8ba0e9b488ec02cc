// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"context"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"

	"github.com/cloister-project/cloister/hypervisor"
	"github.com/cloister-project/cloister/hypervisor/vmtest"
)

func TestMain(m *testing.M) {
	if mode := os.Getenv(fakeVariable); mode != "" {
		fakeQEMU(mode)
	}
	vmtest.Main(m)
}

func testDriver(t testing.TB) *Driver {
	t.Helper()
	if _, err := findBinary(os.Getenv("CLOISTER_TEST_QEMU"), hypervisor.ArchAMD64); err != nil {
		t.Skipf("no QEMU: %v", err)
	}
	d := New(Config{
		Path: os.Getenv("CLOISTER_TEST_QEMU"), CacheDir: filepath.Join(vmtest.CacheDir(t), "qemu"), Arch: hypervisor.ArchAMD64,
	})
	probed(t, d)
	return d
}

// probed is the driver's binary.
func probed(t testing.TB, d *Driver) *program {
	t.Helper()
	p, err := d.open(context.Background())
	require.NoError(t, err)
	return p
}

func features(t testing.TB, d *Driver) Features { return probed(t, d).features }

// guestDocument is a VM that does what says, on any architecture.
func guestDocument(t testing.TB, d *Driver, do string, modules ...string) hypervisor.Document {
	t.Helper()
	arch := d.config.Arch
	doc := vmtest.Document(d, vmtest.Accelerator(t, hypervisor.AccelTCG), vmtest.Kernel(t, arch), vmtest.Initrd(t, arch, modules...), do)
	if arch != hypervisor.ArchAMD64 {
		doc.Architecture, doc.SharedDirectories = arch, 0
	}
	return doc
}

// startGuest starts a VM without booting it.
func startGuest(t testing.TB, d *Driver, doc hypervisor.Document) *vm {
	t.Helper()
	return vmtest.Start(t, d, doc, hypervisor.Resources{}).VM.(*vm)
}

func waitEnd(t testing.TB, v *vm) hypervisor.Exit {
	t.Helper()
	return (&vmtest.VM{VM: v}).WaitEnd(t)
}

// A QEMU that a signal asks to end says so in its last event.
func TestQEMUTerminated(t *testing.T) {
	d := testDriver(t)
	v := startGuest(t, d, guestDocument(t, d, "idle"))
	require.NoError(t, v.Boot(context.Background()))
	require.NoError(t, syscall.Kill(v.PID(), syscall.SIGTERM))
	exit := waitEnd(t, v)
	require.Equal(t, hypervisor.ExitVMM, exit.Reason, exit.Error())
	require.Contains(t, exit.Detail, "ended by a signal of somebody")
}

// What package contract refuses is refused before QEMU is asked, or by every driver; this is QEMU's own.
func TestStartRefusesQEMUsOwn(t *testing.T) {
	d := testDriver(t)
	for name, tc := range map[string]struct {
		change func(*hypervisor.Document)
		is     error
		says   string
	}{
		"unknown CPU":     {func(d *hypervisor.Document) { d.CPU.Model = "z80" }, nil, "unable to find CPU model 'z80'"},
		"vhost not given": {func(d *hypervisor.Document) { d.Vsock.Kind = hypervisor.VsockVhost }, errdefs.ErrInvalidArgument, "vhost-vsock"},
	} {
		t.Run(name, func(t *testing.T) {
			doc := guestDocument(t, d, "idle")
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

func TestNoQEMU(t *testing.T) {
	_, err := New(Config{Path: "/bin/true"}).Capabilities(context.Background())
	require.ErrorContains(t, err, "is it a QEMU")
	_, err = New(Config{Path: "/bin/ls"}).Capabilities(context.Background())
	require.ErrorContains(t, err, "it said")
}

// The command line for KVM is taken by the real binary. Whether the guest runs is for a machine with hardware behind
// KVM; a software KVM does not even have the registers of -cpu host.
func TestStartWithKVM(t *testing.T) {
	d := testDriver(t)
	f, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
	if err != nil {
		t.Skip(err)
	}
	f.Close()
	doc := guestDocument(t, d, "idle")
	doc.Accelerator, doc.CPU.Model = hypervisor.AccelKVM, new(Driver).DefaultCPU(hypervisor.AccelKVM)
	if _, err := d.Accelerator(context.Background(), "kvm"); err != nil {
		doc.CPU.Model = "qemu64"
	}
	v := startGuest(t, d, doc)
	v.Kill()
}
