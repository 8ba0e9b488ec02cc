// SPDX-License-Identifier: Apache-2.0

package qemu

import "github.com/cloister-project/cloister/hypervisor"

// KernelParameters implements hypervisor.Driver.
func (d *Driver) KernelParameters(a hypervisor.Accelerator) []string {
	arch := d.config.Arch
	console := "console=ttyS0"
	if arch == hypervisor.ArchS390X {
		console = "console=ttysclp0" // the SCLP's ASCII console
	}
	p := []string{
		console,
		// Each character on the serial console costs an exit from the guest. A panic is printed all the same.
		"quiet",
		// A panic resets the machine at once; -no-reboot makes that the VM's end.
		"panic=-1",
	}
	if a == hypervisor.AccelTCG {
		p = append(p,
			// The kernel's tests of its own ciphers are a third of all instructions until init (475 of 1516 million,
			// Debian's cloud kernel 6.12, counted with -icount); with KVM they take some ms and stay on.
			"cryptomgr.notests",
			// Three initcalls that compute much at each boot, together 13 % of QEMU's CPU time until init (3.60 to 3.14 s,
			// medians of ten interleaved boots): the jitter entropy source times itself, the kernel's certificates are
			// parsed (for signatures of modules, which the image's do not have), a key derivation is tested. Random
			// numbers come from elsewhere (random.trust_cpu); nothing goes away that a pod could use. With KVM they take
			// some ms and stay on.
			"initcall_blacklist=jent_mod_init,load_system_certificate_list,crypto_kdf108_init",
		)
		if arch != hypervisor.ArchS390X {
			// On a busy host the emulated timer may not tick while the kernel tries it out, and it would panic. Linux
			// sets this by itself on KVM.
			p = append(p, "no_timer_check")
		}
	}
	return p
}
