// SPDX-License-Identifier: Apache-2.0

package se

import (
	"fmt"
	"regexp"
	"strconv"
	"strings"
)

// noFacility is what stage3a says on a machine that cannot unpack.
const noFacility = "Secure unpack facility is not available"

// bootFailed is what stage3a says when the ultravisor refuses: the command, the return code, the reason code.
var bootFailed = regexp.MustCompile(`Protected boot (?:has )?failed: 0x([0-9a-fA-F]{1,8})` +
	`(?:, ([A-Z_]{1,40}) - RC: 0x([0-9a-fA-F]{1,8}), RRC: ?0x([0-9a-fA-F]{1,8}))?`)

// maxConsole bounds how much of a console is looked at, in bytes: stage3a speaks before anybody else.
const maxConsole = 256 << 10

// ultravisorCodes are return codes of the ultravisor's commands that set up and unpack a guest, with what to do.
var ultravisorCodes = map[uint64]string{
	0x0102: "the image does not match its header",
	0x0104: "the header's version is not supported by this machine; build the image with a version that it knows",
	0x0106: "a plaintext control flag of the image is not supported by this machine; build the image without it (`cloister image se " +
		"inspect` shows the flags)",
	0x0108: "no host key of this machine opens the image; build it with this machine's host key document (`cloister check --tee se` " +
		"compares the keys)",
	0x0109: "a secret control flag of the image is not supported by this machine; build the image without it",
	0x010a: "the image's header is corrupt; copy or build the image again",
}

// verifyReasons are reason codes of 0x0102.
var verifyReasons = map[uint64]string{
	0x1a: "the addresses of its components are others (ALD)",
	0x1b: "the content of its components is another (PLD)",
	0x1c: "the tweaks of its components are others (TLD)",
	0x1d: "the number of its pages is another",
}

const (
	codeVerify      = 0x0102
	codeHostKey     = 0x0108
	reasonKeyDiffer = 0x05
)

// explainBootError finds on a guest's console why its image did not start, and says it with what to do; empty: nothing
// of the kind is there. The console is the host's to write, and the guest's: it explains, it proves nothing.
func explainBootError(console string) string {
	console = console[:min(len(console), maxConsole)]
	if strings.Contains(console, noFacility) {
		return "this VM cannot run Secure Execution images: the CPU that it sees has no unpack facility (161); it runs emulated, or the host " +
			"is not set up (`cloister check --tee se`)"
	}
	m := bootFailed.FindStringSubmatch(console)
	if m == nil {
		return ""
	}
	if m[2] == "" {
		return fmt.Sprintf("the ultravisor refused the image (0x%s)", m[1])
	}
	rc, _ := strconv.ParseUint(m[3], 16, 32)
	rrc, _ := strconv.ParseUint(m[4], 16, 32)
	what, known := ultravisorCodes[rc]
	switch {
	case !known:
		what = "the reason is not known here, see the machine's documentation"
	case rc == codeVerify:
		if reason, ok := verifyReasons[rrc]; ok {
			what += ": " + reason
		}
		what += "; copy or build the image again"
	case rc == codeHostKey && rrc == reasonKeyDiffer:
		what = "the machine's host key is another than that of the image: " + what
	}
	return fmt.Sprintf("the ultravisor refused the image (%s, RC 0x%04x, RRC 0x%02x): %s", m[2], rc, rrc, what)
}
