// SPDX-License-Identifier: Apache-2.0

// Command init is PID 1 of the guest that the tests boot out of an image: it prints the sealed command line and powers
// off.
package main

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

func main() {
	if err := run(); err != nil {
		fmt.Println("INIT FAILED:", err)
	}
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
}

func run() error {
	if err := os.MkdirAll("/proc", 0o755); err != nil {
		return err
	}
	if err := unix.Mount("proc", "/proc", "proc", 0, ""); err != nil {
		return err
	}
	line, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return err
	}
	// Lines that do not look like the kernel's own "Kernel command line: …".
	fmt.Printf("SEALED LINE: %q\n", line)
	return nil
}
