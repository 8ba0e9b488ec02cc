// SPDX-License-Identifier: Apache-2.0

package abi

import (
	"fmt"
	"strings"
)

// Platform is a platform's name: in the configuration (tee.platform), on the guest's kernel command line
// (wire.ParamTEE), in the names of the guest image's module phases, on command lines of tools and in reports.
type Platform string

// Platforms.
const (
	// None is an ordinary VM. Nothing of it is hidden from the host.
	None Platform = "none"
	// Sample has all rules of a confidential VM and no hardware behind them: for tests and for learning.
	Sample Platform = "sample"
	// SNP is AMD SEV-SNP.
	SNP Platform = "snp"
	// TDX is Intel TDX.
	TDX Platform = "tdx"
	// SE is IBM Secure Execution for Linux, on s390x.
	SE Platform = "se"
)

// Platforms returns all platforms, None first.
func Platforms() []Platform { return []Platform{None, Sample, SNP, TDX, SE} }

// ParsePlatform returns the platform with a name. The empty name is not one.
func ParsePlatform(name string) (Platform, bool) {
	for _, p := range Platforms() {
		if string(p) == name {
			return p, true
		}
	}
	return "", false
}

// KnownPlatforms lists the names for people.
func KnownPlatforms() string {
	var names []string
	for _, p := range Platforms() {
		names = append(names, string(p))
	}
	return strings.Join(names, ", ")
}

// Confidential reports whether the rules of a confidential VM hold.
func (p Platform) Confidential() bool { return p != None && p != "" }

// Protected reports whether hardware keeps the host out of the VM.
func (p Platform) Protected() bool { return p == SNP || p == TDX || p == SE }

// Architecture returns the only architecture that the platform exists on, in Go's words (GOARCH); empty: it is of none.
func (p Platform) Architecture() string {
	switch p {
	case SNP, TDX:
		return "amd64"
	case SE:
		return "s390x"
	}
	return ""
}

// Describe says in a line for people what the platform protects; it stands in a pod's status, in logs and in tools.
func (p Platform) Describe() string {
	switch p {
	case None:
		return "none (the host can read this VM's memory)"
	case Sample:
		return "sample (NO PROTECTION: the rules of a confidential VM without its hardware; the host can read this VM's memory)"
	case SNP:
		return "snp (AMD SEV-SNP)"
	case TDX:
		return "tdx (Intel TDX)"
	case SE:
		return "se (IBM Secure Execution)"
	}
	return fmt.Sprintf("%q (unknown)", string(p))
}
