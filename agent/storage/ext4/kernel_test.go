// SPDX-License-Identifier: Apache-2.0

package ext4

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/cloister-project/cloister/agent/storage/ext4/testdata/exercise"
	"github.com/cloister-project/cloister/internal/guesttest"
	"github.com/cloister-project/cloister/internal/mountstest"
)

// TestMain keeps what the tests mount to themselves.
func TestMain(m *testing.M) { mountstest.Main(m) }

// loop makes a loop device of a file. It goes with its last user.
func loop(t *testing.T, path string) string {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root for a loop device")
	}
	control, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		t.Skipf("no loop devices: %v", err)
	}
	defer control.Close()
	file, err := os.OpenFile(path, os.O_RDWR, 0)
	require.NoError(t, err)
	defer file.Close()
	for range 100 {
		n, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			t.Skipf("no free loop device: %v", err)
		}
		device, err := os.OpenFile(fmt.Sprint("/dev/loop", n), os.O_RDWR, 0)
		if err != nil {
			t.Skip(err)
		}
		config := unix.LoopConfig{Fd: uint32(file.Fd()), Size: blockSize, Info: unix.LoopInfo64{Flags: unix.LO_FLAGS_AUTOCLEAR}}
		err = unix.IoctlLoopConfigure(int(device.Fd()), &config)
		if err == nil {
			t.Cleanup(func() { require.NoError(t, device.Close()) })
			return device.Name()
		}
		require.NoError(t, device.Close())
		if !errors.Is(err, unix.EBUSY) { // else another process was faster
			t.Skipf("loop device: %v", err)
		}
	}
	t.Skip("no loop device to be had")
	return ""
}

// expect is what statfs of a whole file system says.
func expect(size int64, o Options) (blocks, files int64) {
	if o.InodeRatio == 0 {
		o.InodeRatio = defaultInodeRatio
	}
	l := newLayout(size, o)
	return l.blocks - l.overhead, l.groups * l.inodesPerGroup
}

func TestKernelUsesIt(t *testing.T) {
	for name, test := range map[string]struct {
		size int64
		o    Options
	}{
		"64 MiB":           {64 * mib, someOptions},
		"five groups":      {600*mib + 5*blockSize, someOptions},
		"dirty":            {300 * mib, with(func(o *Options) { o.Zeroed = false })},
		"dirty, no quota":  {300 * mib, with(func(o *Options) { o.Zeroed, o.ProjectQuota = false, false })},
		"no quota":         {600 * mib, with(func(o *Options) { o.ProjectQuota = false })},
		"many inodes":      {600 * mib, with(func(o *Options) { o.InodeRatio = minInodeRatio; o.ProjectQuota = false })},
		"10 GiB, no quota": {10 * gib, with(func(o *Options) { o.ProjectQuota = false })},
	} {
		t.Run(name, func(t *testing.T) {
			path := format(t, test.size, test.o)
			device, dir := loop(t, path), t.TempDir()
			blocks, files := expect(test.size, test.o)
			t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
			err := exercise.Run(exercise.Options{
				Device: device, Dir: dir, Quota: test.o.ProjectQuota, Blocks: uint64(blocks), Files: uint64(files),
			})
			if errors.Is(err, exercise.ErrNoQuota) {
				t.Skip(err)
			}
			require.NoError(t, err)
			check(t, path)
		})
	}
}

const guestTimeout = 5 * time.Minute

// TestGuestUsesIt makes a file system on a disk in a guest, under emulation, with a kernel that has quota files. That on IBM Z
// is of the other byte order.
func TestGuestUsesIt(t *testing.T) {
	for arch, guest := range map[string]struct {
		qemu, kernel, modules string // variables of the environment
		args                  []string
		console               string
		load                  []string
	}{
		"amd64": {
			"CLOISTER_TEST_QEMU", "CLOISTER_TEST_KERNEL", "CLOISTER_TEST_MODULES",
			[]string{"-machine", "q35", "-serial", "stdio", "-device", "virtio-blk-pci,drive=disk"}, "ttyS0",
			[]string{"virtio_blk", "quota_tree", "quota_v2"},
		},
		"s390x": {
			"CLOISTER_TEST_QEMU_S390X", "CLOISTER_TEST_S390X_KERNEL", "CLOISTER_TEST_S390X_MODULES",
			[]string{
				"-machine", "s390-ccw-virtio", "-chardev", "stdio,id=con", "-device", "sclpconsole,chardev=con",
				"-device", "virtio-blk-ccw,drive=disk",
			}, "ttyS0",
			[]string{"virtio_blk", "crc16", "crc32c_generic", "mbcache", "jbd2", "ext4", "quota_tree", "quota_v2"},
		},
	} {
		t.Run(arch, func(t *testing.T) {
			for _, v := range []string{guest.qemu, guest.kernel, guest.modules} {
				if os.Getenv(v) == "" {
					t.Skip(v + " is not set")
				}
			}
			const size = 600 * mib
			path := filepath.Join(t.TempDir(), "disk")
			require.NoError(t, os.WriteFile(path, nil, 0o600))
			require.NoError(t, os.Truncate(path, size))
			initrd := guesttest.Initrd(t, arch, "./testdata/guest", guesttest.Modules(t, os.Getenv(guest.modules), guest.load...)...)
			blocks, files := expect(size, someOptions)

			ctx, cancel := context.WithTimeout(context.Background(), guestTimeout)
			defer cancel()
			cmd := exec.CommandContext(ctx, os.Getenv(guest.qemu), append(guest.args, "-accel", "tcg", "-cpu", "max", "-m", "512M",
				"-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-kernel", os.Getenv(guest.kernel), "-initrd", initrd,
				"-drive", "if=none,id=disk,format=raw,discard=unmap,file="+path,
				"-append", fmt.Sprintf("console=%s panic=-1 quiet ext4.blocks=%d ext4.files=%d", guest.console, blocks, files))...)
			out, err := cmd.CombinedOutput()
			require.NoError(t, err, "%s", out)
			require.Contains(t, string(out), "EXERCISE complete")
			for line := range strings.Lines(string(out)) {
				if strings.HasPrefix(line, "FORMAT") {
					t.Log(strings.TrimSpace(line))
				}
			}
			check(t, path)
		})
	}
}
