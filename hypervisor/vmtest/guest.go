// SPDX-License-Identifier: Apache-2.0

package vmtest

import (
	"cmp"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"
	"github.com/u-root/u-root/pkg/cpio"
	"go.uber.org/goleak"

	"github.com/cloister-project/cloister/hypervisor"
	"github.com/cloister-project/cloister/hypervisor/pvh"
	"github.com/cloister-project/cloister/internal/guesttest"
)

// Timeout is for a guest to do something; generous: emulation on a busy machine.
const Timeout = 120 * time.Second

// initProgram is the guest's PID 1.
const initProgram = "github.com/cloister-project/cloister/internal/guesttest/init"

// DeviceModules drive every device that a document can have with any VMM, in the order in which they are loaded.
var DeviceModules = []string{
	"scsi_common", "scsi_mod", "virtio_scsi", "sd_mod", "virtio_blk", "failover", "net_failover", "virtio_net",
	"vsock", "vmw_vsock_virtio_transport_common", "vmw_vsock_virtio_transport", "virtio-rng",
}

// variables of the environment, for each architecture.
var variables = map[hypervisor.Architecture]struct{ kernel, modules string }{
	hypervisor.ArchAMD64: {"CLOISTER_TEST_KERNEL", "CLOISTER_TEST_MODULES"},
	hypervisor.ArchS390X: {"CLOISTER_TEST_S390X_KERNEL", "CLOISTER_TEST_S390X_MODULES"},
}

// Main runs a package's tests: what TestMain does. No goroutine may be left.
func Main(m *testing.M) {
	goleak.VerifyTestMain(m, goleak.Cleanup(func(code int) {
		_ = os.RemoveAll(cachePath())
		os.Exit(code)
	}))
}

// cachePath is shared by the tests of one run of a test binary.
func cachePath() string {
	return filepath.Join(os.TempDir(), fmt.Sprintf("cloister-vm-test-%d", os.Getpid()))
}

// CacheDir returns a directory that the tests of one run share. Main removes it.
func CacheDir(t testing.TB) string {
	t.Helper()
	require.NoError(t, os.MkdirAll(cachePath(), 0o700))
	return cachePath()
}

// KernelImage returns the path of the kernel for guests of an architecture, as the environment has it.
func KernelImage(t testing.TB, arch hypervisor.Architecture) string {
	t.Helper()
	return variable(t, variables[arch].kernel, "the path of a kernel")
}

// Kernel returns the path of a kernel that VMMs start without firmware.
func Kernel(t testing.TB, arch hypervisor.Architecture) string {
	t.Helper()
	image := KernelImage(t, arch)
	if arch != hypervisor.ArchAMD64 {
		return image
	}
	kernel, err := pvh.Extract(context.Background(), image, filepath.Join(CacheDir(t), "pvh"))
	require.NoError(t, err)
	return kernel
}

// Initrd returns the path of an initrd whose init does what the kernel parameter init.do says
// (internal/guesttest/init), with modules.
func Initrd(t testing.TB, arch hypervisor.Architecture, modules ...string) string {
	t.Helper()
	path := filepath.Join(CacheDir(t), "initrd-"+string(arch)+"-"+strings.Join(modules, "-"))
	if _, err := os.Stat(path); err == nil {
		return path
	}
	var more []cpio.Record
	if len(modules) > 0 {
		dir := variable(t, variables[arch].modules, "a directory like lib/modules/<release>")
		more = guesttest.Modules(t, dir, modules...)
	}
	require.NoError(t, os.Rename(guesttest.Initrd(t, string(arch), initProgram, more...), path))
	return path
}

func variable(t testing.TB, name, what string) string {
	t.Helper()
	value := os.Getenv(name)
	if value == "" {
		t.Skipf("%s (%s) is not set", name, what)
	}
	return value
}

// Accelerator returns what runs amd64 guests: CLOISTER_TEST_ACCEL, or what is given where that is not set.
func Accelerator(t testing.TB, unset hypervisor.Accelerator) hypervisor.Accelerator {
	t.Helper()
	const name = "CLOISTER_TEST_ACCEL"
	accel := hypervisor.Accelerator(cmp.Or(os.Getenv(name), string(unset)))
	require.Contains(t, []hypervisor.Accelerator{hypervisor.AccelTCG, hypervisor.AccelKVM}, accel, name)
	return accel
}

// Document describes a small VM of a driver, for an amd64 guest whose init does what do says. Its vsock needs no device of the
// host's kernel.
func Document(d hypervisor.Driver, accel hypervisor.Accelerator, kernel, initrd, do string) hypervisor.Document {
	kinds := d.VsockKinds()
	vsock := kinds[0]
	if slices.Contains(kinds, hypervisor.VsockVhostUser) {
		vsock = hypervisor.VsockVhostUser
	}
	return hypervisor.Document{
		ID:           "test",
		Architecture: hypervisor.ArchAMD64,
		UUID:         uuid.NewString(),
		Accelerator:  accel,
		CPU:          hypervisor.CPU{Model: d.DefaultCPU(accel), Count: 1},
		Memory:       hypervisor.Memory{Bytes: 256 << 20, Shared: true},
		Boot: hypervisor.Boot{
			Kernel: kernel, Initrd: initrd, Parameters: append(d.KernelParameters(accel), "init.do="+do),
		},
		Vsock:             hypervisor.Vsock{Kind: vsock, CID: 3},
		SharedDirectories: 2,
		Sandboxed:         true,
	}
}
