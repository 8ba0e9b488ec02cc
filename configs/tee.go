// SPDX-License-Identifier: Apache-2.0

package configs

import (
	"encoding/hex"
	"fmt"
	"math"
	"net"
	"runtime"
	"slices"
	"strconv"
	"strings"
)

// Values of Hypervisor.Arch, in Go's words.
const (
	ArchAMD64 = "amd64"
	ArchS390X = "s390x"
)

// Values of TEE.Platform. Package tee says what they mean; a test there compares the lists.
const (
	PlatformNone   = "none"
	PlatformSample = "sample"
	PlatformSNP    = "snp"
	PlatformTDX    = "tdx"
	PlatformSE     = "se"
)

// Platforms lists the values of TEE.Platform.
func Platforms() []string {
	return []string{PlatformNone, PlatformSample, PlatformSNP, PlatformTDX, PlatformSE}
}

// Limits of [tee].
const (
	maxSwiotlbMiB  = 1024
	sha256Bytes    = 32
	snpIDBytes     = 16 // FAMILY_ID and IMAGE_ID: AMD 56860, structure ID_BLOCK
	tdxDigestBytes = 48 // MROWNER and MROWNERCONFIG: Intel 348551, TD_PARAMS
	maxSocketPath  = 107
)

// Bits that let the host read and change the guest: AMD 56860 section 4.3, Intel 348551 ATTRIBUTES.
const (
	snpPolicyDebug    = 1 << 19
	tdxAttributeDebug = 1 << 0
)

func teeSettings() []setting {
	return []setting{
		text("tee.platform", func(c *Config) *string { return &c.TEE.Platform }, oneOf(Platforms()...)),
		list("tee.firmware_descriptors", func(c *Config) *[]string { return &c.TEE.FirmwareDescriptors }, eachOf(absolutePath)),
		text("tee.initdata", func(c *Config) *string { return &c.TEE.Initdata }, emptyOr(absolutePath)),
		flag("tee.allow_debug", func(c *Config) *bool { return &c.TEE.AllowDebug }),
		number("tee.swiotlb_mib", func(c *Config) *int { return &c.TEE.SwiotlbMiB }, 0, maxSwiotlbMiB),

		text("tee.snp.firmware", func(c *Config) *string { return &c.TEE.SNP.Firmware }, emptyOr(absolutePath)),
		list("tee.snp.firmware_digests", func(c *Config) *[]string { return &c.TEE.SNP.FirmwareDigests }, eachOf(hexBytes(sha256Bytes))),
		bits("tee.snp.policy", func(c *Config) *uint64 { return &c.TEE.SNP.Policy }),
		bits("tee.snp.guest_features", func(c *Config) *uint64 { return &c.TEE.SNP.GuestFeatures }),
		text("tee.snp.id_key", func(c *Config) *string { return &c.TEE.SNP.IDKey }, emptyOr(absolutePath)),
		text("tee.snp.author_key", func(c *Config) *string { return &c.TEE.SNP.AuthorKey }, emptyOr(absolutePath)),
		text("tee.snp.family_id", func(c *Config) *string { return &c.TEE.SNP.FamilyID }, emptyOr(hexBytes(snpIDBytes))),
		text("tee.snp.image_id", func(c *Config) *string { return &c.TEE.SNP.ImageID }, emptyOr(hexBytes(snpIDBytes))),
		number("tee.snp.guest_svn", func(c *Config) *int { return &c.TEE.SNP.GuestSVN }, 0, math.MaxUint32),

		text("tee.tdx.firmware", func(c *Config) *string { return &c.TEE.TDX.Firmware }, emptyOr(absolutePath)),
		list("tee.tdx.firmware_digests", func(c *Config) *[]string { return &c.TEE.TDX.FirmwareDigests }, eachOf(hexBytes(sha256Bytes))),
		bits("tee.tdx.attributes", func(c *Config) *uint64 { return &c.TEE.TDX.Attributes }),
		text("tee.tdx.quote_socket", func(c *Config) *string { return &c.TEE.TDX.QuoteSocket }, emptyOr(quoteSocket)),
		text("tee.tdx.mrowner", func(c *Config) *string { return &c.TEE.TDX.MROwner }, emptyOr(hexBytes(tdxDigestBytes))),
		text("tee.tdx.mrownerconfig", func(c *Config) *string { return &c.TEE.TDX.MROwnerConfig }, emptyOr(hexBytes(tdxDigestBytes))),

		text("tee.se.image", func(c *Config) *string { return &c.TEE.SE.Image }, emptyOr(absolutePath)),
	}
}

// bits is a number of 64 bits, as a TOML integer (which has 63 and may be hexadecimal) or as text.
func bits(key string, field func(*Config) *uint64) setting {
	return setting{key, func(c *Config, raw any) *problem {
		switch v := raw.(type) {
		case int64:
			if v < 0 {
				return &problem{fmt.Sprintf("%d is negative", v), `give a number such as 0x30000, or text such as "0x30000"`}
			}
			*field(c) = uint64(v)
			return nil
		case string:
			n, err := strconv.ParseUint(v, 0, 64)
			if err != nil {
				return &problem{fmt.Sprintf("%q is not a number of 64 bits", clip(v)), `give a number such as 0x30000, or text such as "0x30000"`}
			}
			*field(c) = n
			return nil
		}
		return wrongType(raw, `a number such as 0x30000, or text such as "0x30000"`)
	}}
}

func eachOf(check func(string) *problem) func([]string) *problem {
	return func(items []string) *problem {
		for i, s := range items {
			if p := check(s); p != nil {
				return &problem{fmt.Sprintf("entry %d: %s", i+1, p.reason), p.fix}
			}
		}
		return nil
	}
}

func hexBytes(n int) func(string) *problem {
	return func(s string) *problem {
		if b, err := hex.DecodeString(s); err != nil || len(b) != n {
			return &problem{fmt.Sprintf("%q is not %d bytes in hexadecimal digits", clip(s), n), fmt.Sprintf("give %d digits", 2*n)}
		}
		return nil
	}
}

// quoteSocket is "unix:/path" or "vsock:CID:PORT".
func quoteSocket(s string) *problem {
	const fix = `give "unix:/absolute/path", "vsock:CID:PORT", or "" for none`
	kind, rest, _ := strings.Cut(s, ":")
	switch kind {
	case "unix":
		if p := absolutePath(rest); p != nil {
			return &problem{p.reason, fix}
		}
		if len(rest) > maxSocketPath {
			return &problem{fmt.Sprintf("the path is %d bytes long", len(rest)), fmt.Sprintf("give at most %d, what a unix socket's may have", maxSocketPath)}
		}
		return nil
	case "vsock":
		cid, port, err := net.SplitHostPort(rest)
		if err == nil {
			if _, err = strconv.ParseUint(cid, 10, 32); err == nil {
				_, err = strconv.ParseUint(port, 10, 32)
			}
		}
		if err != nil {
			return &problem{fmt.Sprintf("%q has no CID and port", clip(s)), fix}
		}
		return nil
	}
	return &problem{fmt.Sprintf("%q is of no known kind", clip(s)), fix}
}

// confidential tells whether the platform is any but that of ordinary VMs.
func (t TEE) confidential() bool { return t.Platform != PlatformNone && t.Platform != "" }

// protected tells whether hardware stands behind the platform.
func (t TEE) protected() bool { return t.confidential() && t.Platform != PlatformSample }

// Architecture is the guest's: hypervisor.arch, or the host's where that is empty.
func (c *Config) Architecture() string {
	if c.Hypervisor.Arch != "" {
		return c.Hypervisor.Arch
	}
	return runtime.GOARCH
}

// SealedImage is the Secure Execution image that VMs boot in place of kernel and initrd; empty: these. The sample platform
// boots one on s390x if there is one, for tests of such images without the hardware.
func (c *Config) SealedImage() string {
	if c.TEE.Platform == PlatformSE || c.TEE.Platform == PlatformSample && c.Architecture() == ArchS390X {
		return c.TEE.SE.Image
	}
	return ""
}

// platformArch is the only architecture that a platform is of; empty: it has none of its own.
func platformArch(platform string) string {
	switch platform {
	case PlatformSNP, PlatformTDX:
		return ArchAMD64
	case PlatformSE:
		return ArchS390X
	}
	return ""
}

// commandLine stands for a file in the faults of what a user of a tool asked for.
const commandLine = "command line"

// WithPlatform gives a copy of c with another tee.platform, for tools that look at more than the configured one. Where
// hypervisor.arch is not set it becomes the platform's own. The error is of type Faults; for who only looks at the platform
// the copy is given along with it, unless the name is not known.
func (c *Config) WithPlatform(platform string) (*Config, error) {
	n := c.clone()
	n.TEE.Platform = platform
	n.origins["tee.platform"] = origin{file: commandLine}
	if p := oneOf(Platforms()...)(platform); p != nil {
		return nil, Faults{n.fault("tee.platform", p.reason, p.fix)}
	}
	if arch := platformArch(platform); n.Hypervisor.Arch == "" && arch != runtime.GOARCH {
		n.Hypervisor.Arch = arch
	}
	return n, crossCheck(n).err()
}

// crossCheckTEE finds what contradicts the platform, or weakens it.
func crossCheckTEE(c *Config) Faults {
	var fs Faults
	add := func(key, reason, fix string) { fs = append(fs, c.fault(key, reason, fix)) }
	t := c.TEE
	if t.SNP.Policy&snpPolicyDebug != 0 && !t.AllowDebug {
		add("tee.snp.policy", fmt.Sprintf("%#x has bit 19 (debug) set: the host could read and change the guest", t.SNP.Policy),
			"clear it, or set tee.allow_debug = true for a test that protects nothing")
	}
	if t.TDX.Attributes&tdxAttributeDebug != 0 && !t.AllowDebug {
		add("tee.tdx.attributes", fmt.Sprintf("%#x has bit 0 (debug) set: the host could read and change the guest", t.TDX.Attributes),
			"clear it, or set tee.allow_debug = true for a test that protects nothing")
	}
	if t.SNP.AuthorKey != "" && t.SNP.IDKey == "" {
		add("tee.snp.author_key", "is set without tee.snp.id_key, the key that it signs", "set both, or only tee.snp.id_key")
	}
	if !t.confidential() {
		// A tee.initdata is for the handlers that name a platform; an ordinary VM is refused with one when it is launched.
		return fs
	}
	if c.Log.DebugConsole {
		add("log.debug_console", fmt.Sprintf("is true with tee.platform = %q: the host would read what the guest writes to its console", t.Platform),
			"set it to false")
	}
	if want := platformArch(t.Platform); want != "" && c.Architecture() != want {
		key := "hypervisor.arch"
		if c.Hypervisor.Arch == "" {
			key = "tee.platform"
		}
		add(key, fmt.Sprintf("guests are of the architecture %s, and platform %q is of %s", c.Architecture(), t.Platform, want),
			fmt.Sprintf("run on a machine of that architecture, or choose another platform (%s)", orList(Platforms())))
	}
	if !t.protected() {
		return fs
	}
	if c.Hypervisor.Accel == AccelTCG {
		add("hypervisor.accel", fmt.Sprintf("is %q with tee.platform = %q: an emulated CPU protects nothing", AccelTCG, t.Platform),
			fmt.Sprintf("set it to %q or %q", AccelAuto, AccelKVM))
	}
	model, _, _ := strings.Cut(c.Hypervisor.CPUModel, ",")
	switch t.Platform {
	case PlatformSNP:
		if slices.Contains([]string{"host", "max"}, model) {
			add("hypervisor.cpu_model", fmt.Sprintf("%q depends on the machine, and SEV-SNP measures the model", c.Hypervisor.CPUModel),
				`give a fixed one such as "EPYC-v4", or "" for that`)
		}
	case PlatformTDX, PlatformSE:
		if model != "" && model != "host" {
			add("hypervisor.cpu_model", fmt.Sprintf("%q: platform %q takes no model but \"host\"", c.Hypervisor.CPUModel, t.Platform), `give "" or "host"`)
		}
	}
	if t.Platform == PlatformSE {
		if t.SE.Image == "" {
			add("tee.se.image", `is empty with tee.platform = "se": kernel, initrd and command line are in it`, "build one with `cloister image se build` and name it")
		}
		if c.Hypervisor.Vsock == VsockVhostUser {
			add("hypervisor.vsock", fmt.Sprintf("%q is a PCI device, which Secure Execution does not have", VsockVhostUser), fmt.Sprintf("set it to %q or %q", VsockAuto, VsockVhost))
		}
	}
	return fs
}

// checkTEEFiles looks at the files that the platform needs beside those of every VM.
func (c *Config) checkTEEFiles() Faults {
	if !c.TEE.confidential() {
		return nil
	}
	var faults Faults
	check := func(key, path, fix string) {
		if path == "" {
			return
		}
		if err := checkReadable(path); err != nil {
			faults = append(faults, c.fault(key, fmt.Sprintf("%s: %s", path, reasonOf(err)), fix))
		}
	}
	check("tee.initdata", c.TEE.Initdata, "make the file readable, or set the key to \"\"")
	switch c.TEE.Platform {
	case PlatformSNP:
		check("tee.snp.firmware", c.TEE.SNP.Firmware, "install a firmware image built for SEV-SNP (Debian: ovmf-amdsev), or set the key to \"\" to have it found")
		check("tee.snp.id_key", c.TEE.SNP.IDKey, "make the file readable, or set the key to \"\"")
		check("tee.snp.author_key", c.TEE.SNP.AuthorKey, "make the file readable, or set the key to \"\"")
	case PlatformTDX:
		check("tee.tdx.firmware", c.TEE.TDX.Firmware, "install a firmware image built for TDX, or set the key to \"\" to have it found")
	}
	return faults
}
