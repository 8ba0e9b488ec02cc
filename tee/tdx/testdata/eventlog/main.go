// SPDX-License-Identifier: Apache-2.0

// Command eventlog is the init of a guest with a TPM. It prints the firmware's event log in hexadecimal lines and powers
// the guest off.
package main

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

const (
	log      = "/sys/kernel/security/tpm0/binary_bios_measurements"
	lineSize = 40
)

func main() {
	if err := run(); err != nil {
		fmt.Println("eventlog failed:", err)
	}
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
}

func run() error {
	if err := os.MkdirAll("/sys", 0o755); err != nil {
		return err
	}
	if err := unix.Mount("sysfs", "/sys", "sysfs", 0, ""); err != nil {
		return fmt.Errorf("mount sysfs: %w", err)
	}
	if err := unix.Mount("securityfs", "/sys/kernel/security", "securityfs", 0, ""); err != nil {
		return fmt.Errorf("mount securityfs: %w", err)
	}
	b, err := os.ReadFile(log)
	if err != nil {
		return err
	}
	for len(b) > 0 {
		n := min(lineSize, len(b))
		fmt.Printf("eventlog %x\n", b[:n])
		b = b[n:]
	}
	fmt.Println("eventlog complete")
	return nil
}
