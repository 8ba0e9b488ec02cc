// SPDX-License-Identifier: Apache-2.0

// Command init is PID 1 of a test guest: it says that it runs and powers off.
package main

import (
	"fmt"
	"syscall"
)

func main() {
	fmt.Println("cloister-agent: the test's init runs")
	if err := syscall.Reboot(syscall.LINUX_REBOOT_CMD_POWER_OFF); err != nil {
		fmt.Println("power off:", err)
	}
}
