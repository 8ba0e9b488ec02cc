// SPDX-License-Identifier: Apache-2.0

package fwcfg

import (
	"context"
	"os"
	"os/exec"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
)

// firmwareTimeout is generous: emulation on a busy machine.
const firmwareTimeout = 120 * time.Second

func testQEMU(t *testing.T) string {
	t.Helper()
	name := os.Getenv("CLOISTER_TEST_QEMU")
	if name == "" {
		name = "qemu-system-x86_64"
	}
	path, err := exec.LookPath(name)
	if err != nil {
		t.Skipf("no QEMU: %v", err)
	}
	return path
}

func testFirmware(t *testing.T) string {
	t.Helper()
	path := os.Getenv("CLOISTER_TEST_OVMF")
	if path == "" {
		t.Skip("CLOISTER_TEST_OVMF names no firmware (make test-vm sets it)")
	}
	return path
}

func machineArgs(firmware string, more ...string) []string {
	return append([]string{
		"-nodefaults", "-no-user-config", "-machine", "q35,smm=off", "-accel", "tcg", "-cpu", "max", "-m", "512M", "-bios", firmware,
	}, more...)
}

func TestACPITables(t *testing.T) {
	qemu, fw := testQEMU(t), testFirmware(t)
	ctx, cancel := context.WithTimeout(context.Background(), firmwareTimeout)
	defer cancel()
	a, err := ACPITables(ctx, qemu, machineArgs(fw, "-smp", "3")...)
	require.NoError(t, err)
	require.Contains(t, string(a.Tables), "MCFG", "the firmware has set up PCI")
	require.Contains(t, string(a.Loader), itemTables)
}

func TestACPITablesSaysWhatWentWrong(t *testing.T) {
	qemu := testQEMU(t)
	ctx, cancel := context.WithTimeout(context.Background(), firmwareTimeout)
	defer cancel()
	_, err := ACPITables(ctx, qemu, "-machine", "nonsense")
	require.ErrorIs(t, err, errdefs.ErrUnavailable)
	require.ErrorContains(t, err, "unsupported machine type")
	_, err = ACPITables(ctx, "/nonexistent/qemu")
	require.ErrorIs(t, err, os.ErrNotExist)

	// A firmware that takes no tables: a page that halts.
	path := t.TempDir() + "/halt"
	image := make([]byte, 64<<10)
	copy(image[len(image)-16:], []byte{0xfa, 0xf4, 0xeb, 0xfd}) // cli; hlt; jmp
	require.NoError(t, os.WriteFile(path, image, 0o644))
	short, cancel := context.WithTimeout(context.Background(), 3*time.Second)
	defer cancel()
	_, err = ACPITables(short, qemu, machineArgs(path)...)
	require.ErrorIs(t, err, context.DeadlineExceeded)
}
