// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"strings"

	"github.com/cloister-project/cloister/hypervisor"
)

// advice is what to do about words of QEMU that mean little to whoever runs a node. The words are QEMU's errors in
// accel/kvm, target/i386/kvm, target/i386/sev.c and system/physmem.c.
var advice = []struct{ said, do string }{
	{"vm-type SEV-SNP not supported by KVM", "KVM on this host runs no SEV-SNP guests; `cloister check --tee snp` tells what is missing"},
	{"vm-type TDX not supported by KVM", "KVM on this host runs no TDX guests; `cloister check --tee tdx` tells what is missing"},
	{"private guest memory for", "confidential VMs need KVM (hypervisor.accel)"}, // "cannot set up … : KVM required"
	{"cbitpos check failed", "the C-bit's position in the VM's description is not this host's; `cloister check --tee snp` tells what the host has"},
}

func adviceFor(log string) string {
	for _, a := range advice {
		if strings.Contains(log, a.said) {
			return a.do
		}
	}
	return ""
}

// Words of the boot loader in a Secure Execution image (s390-tools, stage 3a) when the machine does not unpack it.
const (
	noUnpackFacility = "Secure unpack facility is not available"
	unpackFailed     = "Protected boot failed"
)

// lastWords finds on the console why the guest ended: the kernel's panic, or why a sealed image did not start.
func lastWords(doc hypervisor.Document, console string) string {
	if line := panicLine(console); line != "" || !doc.Boot.Sealed {
		return line
	}
	for line := range strings.Lines(console) {
		if strings.Contains(line, noUnpackFacility) {
			return "the sealed image did not start: " + clip(line) + " (no Secure Execution here; `cloister check --tee se` tells what is missing)"
		}
		if strings.Contains(line, unpackFailed) {
			return "the sealed image did not start: " + clip(line)
		}
	}
	return ""
}
