// SPDX-License-Identifier: Apache-2.0

package snp

import (
	"fmt"
	"strings"

	"github.com/cloister-project/cloister/tee"
	"github.com/cloister-project/cloister/tee/abi"
)

// Policy of a guest: 56860 section 4.3. The CPU's firmware enforces it, and the report shows it.
type Policy uint64

// Bits of a policy. Bits 0 to 7 and 8 to 15 are the lowest minor and major version of the firmware's ABI that may run the
// guest.
const (
	// PolicySMT allows hosts with simultaneous multithreading.
	PolicySMT Policy = 1 << 16
	// PolicyReserved must be one.
	PolicyReserved Policy = 1 << 17
	// PolicyMigrateMA allows a migration agent, which gets the guest's memory and state.
	PolicyMigrateMA Policy = 1 << 18
	// PolicyDebug allows the host to read and write the guest's memory and registers.
	PolicyDebug = Policy(abi.SNPPolicyDebug)
	// PolicySingleSocket wants the guest on one socket.
	PolicySingleSocket Policy = 1 << 20
	// PolicyCXL allows CXL devices.
	PolicyCXL Policy = 1 << 21
	// PolicyAES256XTS wants memory encrypted with AES-256-XTS.
	PolicyAES256XTS Policy = 1 << 22
	// PolicyNoRAPL wants the host's power measurements off.
	PolicyNoRAPL Policy = 1 << 23
	// PolicyCiphertextHiding wants the host to see no ciphertext of the guest's memory.
	PolicyCiphertextHiding Policy = 1 << 24
	// PolicyNoPageSwap keeps the host from swapping the guest's pages.
	PolicyNoPageSwap Policy = 1 << 25

	// DefaultPolicy is QEMU's: simultaneous multithreading is allowed, everything else is not.
	DefaultPolicy = PolicyReserved | PolicySMT

	policyKnown = 1<<26 - 1
)

// Policy's bits by name, for people.
var policyNames = [...]struct {
	bit  Policy
	name string
}{
	{PolicySMT, "smt"}, {PolicyMigrateMA, "migrate-ma"}, {PolicyDebug, "debug"}, {PolicySingleSocket, "single-socket"}, {PolicyCXL, "cxl"},
	{PolicyAES256XTS, "aes-256-xts"}, {PolicyNoRAPL, "no-rapl"}, {PolicyCiphertextHiding, "ciphertext-hiding"}, {PolicyNoPageSwap,
		"no-page-swap"},
}

// ABI is the lowest version of the firmware's ABI that may run the guest.
func (p Policy) ABI() (major, minor uint8) { return uint8(p >> 8), uint8(p) }

// String names what is set: "0x30000 (smt, abi>=0.0)".
func (p Policy) String() string {
	var set []string
	for _, n := range policyNames {
		if p&n.bit != 0 {
			set = append(set, n.name)
		}
	}
	major, minor := p.ABI()
	set = append(set, fmt.Sprintf("abi>=%d.%d", major, minor))
	return fmt.Sprintf("%#x (%s)", uint64(p), strings.Join(set, ", "))
}

// Faults names what weakens the guest and what the hardware would refuse. A debug policy is accepted with allowDebug.
func (p Policy) Faults(allowDebug bool) (faults tee.Faults) {
	fault := func(fix, format string, a ...any) {
		faults.Add("tee.snp.policy", fix, "%#x: "+format, append([]any{uint64(p)}, a...)...)
	}
	if p&PolicyReserved == 0 {
		fault(fmt.Sprintf("set it; the usual value is %#x", uint64(DefaultPolicy)), "bit 17 is not set; the firmware demands it")
	}
	if unknown := p &^ policyKnown; unknown != 0 {
		fault("clear them", "bits %#x are reserved", uint64(unknown))
	}
	if p&PolicyMigrateMA != 0 {
		fault("clear it", "bit 18 allows a migration agent, which gets all of the guest's memory; no agent is supported")
	}
	if p&PolicyDebug != 0 && !allowDebug {
		fault("clear it, or set tee.allow_debug = true for a test that protects nothing",
			"bit 19 (debug) lets the host read and change the guest")
	}
	return faults
}
