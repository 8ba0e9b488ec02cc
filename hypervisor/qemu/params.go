// SPDX-License-Identifier: Apache-2.0

package qemu

import "github.com/cloister-project/cloister/hypervisor"

// KernelParameters are those that the guest's kernel needs to run on this driver's machine.
func KernelParameters(a hypervisor.Accelerator) []string {
	return []string{
		"console=ttyS0",
		"quiet",
		// A panic resets the machine at once; -no-reboot makes that the VM's end.
		"panic=-1",
	}
}
