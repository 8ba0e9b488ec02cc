// SPDX-License-Identifier: Apache-2.0

// Command guest is the init of a guest with a disk of zeros. It makes a file system there, has the kernel use it as the
// kernel parameters ext4.blocks and ext4.files say, prints what came of it and powers the guest off.
package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cloister-project/cloister/agent/storage/ext4"
	"github.com/cloister-project/cloister/agent/storage/ext4/testdata/exercise"
)

const disk = "/dev/vda"

func main() {
	if err := run(); err != nil {
		fmt.Println("EXERCISE failed:", err)
	} else {
		fmt.Println("EXERCISE complete")
	}
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
}

func run() error {
	for _, m := range [][2]string{{"proc", "/proc"}, {"sysfs", "/sys"}, {"devtmpfs", "/dev"}, {"tmpfs", "/run"}} {
		if err := os.MkdirAll(m[1], 0o755); err != nil {
			return err
		}
		if err := unix.Mount(m[0], m[1], m[0], 0, ""); err != nil {
			return fmt.Errorf("mount %s: %w", m[1], err)
		}
	}
	// Emulated clocks may be ahead of the host's, where e2fsck would then find the last write to be in the future.
	if err := unix.Settimeofday(&unix.Timeval{Sec: 1_700_000_000}); err != nil {
		return fmt.Errorf("set the clock: %w", err)
	}
	modules, err := filepath.Glob("/modules/*.ko")
	if err != nil {
		return err
	}
	slices.Sort(modules)
	for _, name := range modules {
		if err := load(name); err != nil {
			return fmt.Errorf("load %s: %w", name, err)
		}
	}
	parameters, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return err
	}
	o := exercise.Options{Device: disk, Dir: "/run/disk", Quota: true}
	for _, p := range strings.Fields(string(parameters)) {
		if v, ok := strings.CutPrefix(p, "ext4.blocks="); ok {
			o.Blocks, err = strconv.ParseUint(v, 10, 64)
		} else if v, ok := strings.CutPrefix(p, "ext4.files="); ok {
			o.Files, err = strconv.ParseUint(v, 10, 64)
		}
		if err != nil {
			return err
		}
	}
	if err := format(); err != nil {
		return err
	}
	if err := os.Mkdir(o.Dir, 0o755); err != nil {
		return err
	}
	return exercise.Run(o)
}

func load(module string) error {
	f, err := os.Open(module)
	if err != nil {
		return err
	}
	defer f.Close()
	return unix.FinitModule(int(f.Fd()), "", 0)
}

func format() (err error) {
	f, err := os.OpenFile(disk, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	size, err := f.Seek(0, 2)
	if err != nil {
		return err
	}
	start := time.Now()
	err = ext4.Format(f, size, ext4.Options{UUID: [16]byte{1}, Now: start, Zeroed: true, ProjectQuota: true})
	fmt.Printf("FORMAT %d bytes in %v\n", size, time.Since(start))
	return err
}
