// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"
	"github.com/u-root/u-root/pkg/cpio"
	"github.com/ulikunitz/xz"
	"go.uber.org/goleak"

	"github.com/cloister-project/cloister/hypervisor"
	"github.com/cloister-project/cloister/hypervisor/pvh"
	"github.com/cloister-project/cloister/internal/guesttest"
)

func TestMain(m *testing.M) {
	if mode := os.Getenv(fakeVariable); mode != "" {
		fakeQEMU(mode)
	}
	goleak.VerifyTestMain(m, goleak.Cleanup(func(code int) {
		_ = os.RemoveAll(cachePath())
		os.Exit(code)
	}))
}

// The tests with a real guest boot the kernel CLOISTER_TEST_KERNEL (a bzImage) to testdata/init. Those that need
// modules take them from CLOISTER_TEST_MODULES, a directory like lib/modules/<release>.
const (
	kernelVariable  = "CLOISTER_TEST_KERNEL"
	modulesVariable = "CLOISTER_TEST_MODULES"
	// The same for emulated s390x guests; the kernel is a raw image.
	s390xKernelVariable  = "CLOISTER_TEST_S390X_KERNEL"
	s390xModulesVariable = "CLOISTER_TEST_S390X_MODULES"
	// What runs amd64 guests: "tcg", which is the default, or "kvm".
	accelVariable = "CLOISTER_TEST_ACCEL"

	// bootTimeout is generous: emulation on a busy machine.
	bootTimeout = 120 * time.Second
)

// scsiModules in the order in which they are loaded.
var scsiModules = []string{"scsi_common", "scsi_mod", "virtio_scsi", "sd_mod"}

func testDriver(t testing.TB) *Driver {
	t.Helper()
	if _, err := findBinary(os.Getenv("CLOISTER_TEST_QEMU"), hypervisor.ArchAMD64); err != nil {
		t.Skipf("no QEMU: %v", err)
	}
	d := New(Config{Path: os.Getenv("CLOISTER_TEST_QEMU"), CacheDir: filepath.Join(cacheDir(t), "qemu"), Arch: hypervisor.ArchAMD64})
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

// cachePath is shared by the tests of one run of the test binary.
func cachePath() string {
	return filepath.Join(os.TempDir(), fmt.Sprintf("cloister-qemu-test-%d", os.Getpid()))
}

func cacheDir(t testing.TB) string {
	t.Helper()
	require.NoError(t, os.MkdirAll(cachePath(), 0o700))
	return cachePath()
}

func testKernel(t testing.TB) string {
	t.Helper()
	image := os.Getenv(kernelVariable)
	if image == "" {
		t.Skip(kernelVariable + " (the path of a Debian bzImage) is not set")
	}
	kernel, err := pvh.Extract(context.Background(), image, filepath.Join(cacheDir(t), "pvh"))
	require.NoError(t, err)
	return kernel
}

// testInitrd builds testdata/init and packs it, with modules.
func testInitrd(t testing.TB, modules ...string) string {
	t.Helper()
	return testInitrdFor(t, hypervisor.ArchAMD64, modules...)
}

func testInitrdFor(t testing.TB, arch hypervisor.Architecture, modules ...string) string {
	t.Helper()
	path := filepath.Join(cacheDir(t), "initrd-"+string(arch)+"-"+strings.Join(modules, "-"))
	if _, err := os.Stat(path); err == nil {
		return path
	}
	more := []cpio.Record{cpio.Directory("modules", 0o755)}
	for i, m := range modules {
		more = append(more, cpio.StaticFile(fmt.Sprintf("modules/%02d-%s.ko", i, m), string(testModule(t, arch, m)), 0o644))
	}
	require.NoError(t, os.Rename(guesttest.Initrd(t, string(arch), "./testdata/init", more...), path))
	return path
}

func testModule(t testing.TB, arch hypervisor.Architecture, name string) []byte {
	variable := modulesVariable
	if arch == hypervisor.ArchS390X {
		variable = s390xModulesVariable
	}
	dir := os.Getenv(variable)
	if dir == "" {
		t.Skip(variable + " (a directory like lib/modules/<release>) is not set")
	}
	var found string
	err := filepath.WalkDir(dir, func(path string, _ os.DirEntry, err error) error {
		if filepath.Base(path) == name+".ko.xz" {
			found = path
		}
		return err
	})
	require.NoError(t, err)
	require.NotEmpty(t, found, "module %s in %s", name, dir)
	f, err := os.Open(found)
	require.NoError(t, err)
	defer f.Close()
	r, err := xz.NewReader(f)
	require.NoError(t, err)
	b, err := io.ReadAll(r)
	require.NoError(t, err)
	return b
}

// testDocument is a VM with the embedded vsock device that does what says.
func testDocument(t testing.TB, kernel, initrd, do string) hypervisor.Document {
	t.Helper()
	accel := hypervisor.Accelerator(cmp.Or(os.Getenv(accelVariable), string(hypervisor.AccelTCG)))
	require.Contains(t, []hypervisor.Accelerator{hypervisor.AccelTCG, hypervisor.AccelKVM}, accel, accelVariable)
	return hypervisor.Document{
		ID:           "test",
		Architecture: hypervisor.ArchAMD64,
		UUID:         uuid.NewString(),
		Accelerator:  accel,
		CPU:          hypervisor.CPU{Model: new(Driver).DefaultCPU(accel), Count: 1},
		Memory:       hypervisor.Memory{Bytes: 256 << 20, Shared: true},
		Boot: hypervisor.Boot{
			Kernel: kernel, Initrd: initrd,
			Parameters: append(New(Config{Arch: hypervisor.ArchAMD64}).KernelParameters(accel), "init.do="+do),
		},
		Vsock:             hypervisor.Vsock{Kind: hypervisor.VsockVhostUser, CID: 3},
		SharedDirectories: 2,
		Sandboxed:         true,
	}
}

// startGuest starts a VM without booting it, and checks in the end that nothing is left.
func startGuest(t testing.TB, d *Driver, doc hypervisor.Document) *vm {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), bootTimeout)
	defer cancel()
	h, err := d.Start(ctx, doc, hypervisor.Resources{StateDir: t.TempDir()})
	require.NoError(t, err)
	v := h.(*vm)
	t.Cleanup(func() {
		v.Kill()
		require.NoDirExists(t, fmt.Sprintf("/proc/%d", v.PID()))
		if t.Failed() {
			t.Log(v.Exit())
		}
	})
	return v
}

// bootGuest starts a VM and waits for its init.
func bootGuest(t testing.TB, d *Driver, doc hypervisor.Document) *vm {
	t.Helper()
	v := startGuest(t, d, doc)
	require.NoError(t, v.Boot(context.Background()))
	waitConsole(t, v, "INIT up")
	return v
}

// waitConsole waits for a text on the console, and returns its line.
func waitConsole(t testing.TB, v *vm, text string) string {
	t.Helper()
	return waitConsoleAfter(t, v, "", text)
}

// waitConsoleAfter waits for a text on the console after another one.
func waitConsoleAfter(t testing.TB, v *vm, mark, text string) string {
	t.Helper()
	timer := time.NewTimer(bootTimeout)
	defer timer.Stop()
	for {
		all, changed := v.Logs.Console.Text()
		if i := strings.LastIndex(all, text); i >= 0 && (mark == "" || i > strings.LastIndex(all, mark)) {
			if line, _, whole := strings.Cut(all[i:], "\n"); whole {
				return line
			}
		}
		select {
		case <-changed:
		case <-v.Done():
			require.Failf(t, "the VM ended", "waiting for %q: %v", text, v.Exit())
		case <-timer.C:
			require.Failf(t, "timeout", "waiting for %q on the console:\n%s", text, all)
		}
	}
}

func waitEnd(t testing.TB, v *vm) hypervisor.Exit {
	t.Helper()
	select {
	case <-v.Done():
		return v.Exit()
	case <-time.After(bootTimeout):
		require.Fail(t, "the VM did not end")
		return hypervisor.Exit{}
	}
}
