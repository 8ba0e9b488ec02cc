// SPDX-License-Identifier: Apache-2.0

package configs

import (
	"encoding/hex"
	"fmt"
	"math"
	"runtime"
	"strconv"

	"github.com/cloister-project/cloister/tee/abi"
)

// Values of Hypervisor.Arch, in Go's words.
const (
	ArchAMD64 = "amd64"
	ArchS390X = "s390x"
)

// Limits of [tee].
const (
	maxSwiotlbMiB = 1024
	sha256Bytes   = 32
)

func teeSettings() []setting {
	return []setting{
		text("tee.platform", func(c *Config) *string { return &c.TEE.Platform }, oneOf(platforms()...)),
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
		text("tee.snp.family_id", func(c *Config) *string { return &c.TEE.SNP.FamilyID }, emptyOr(hexBytes(abi.SNPIDSize))),
		text("tee.snp.image_id", func(c *Config) *string { return &c.TEE.SNP.ImageID }, emptyOr(hexBytes(abi.SNPIDSize))),
		number("tee.snp.guest_svn", func(c *Config) *int { return &c.TEE.SNP.GuestSVN }, 0, math.MaxUint32),

		text("tee.tdx.firmware", func(c *Config) *string { return &c.TEE.TDX.Firmware }, emptyOr(absolutePath)),
		list("tee.tdx.firmware_digests", func(c *Config) *[]string { return &c.TEE.TDX.FirmwareDigests }, eachOf(hexBytes(sha256Bytes))),
		bits("tee.tdx.attributes", func(c *Config) *uint64 { return &c.TEE.TDX.Attributes }),
		text("tee.tdx.quote_socket", func(c *Config) *string { return &c.TEE.TDX.QuoteSocket }, nil),
		text("tee.tdx.mrowner", func(c *Config) *string { return &c.TEE.TDX.MROwner }, emptyOr(hexBytes(abi.TDXDigestSize))),
		text("tee.tdx.mrownerconfig", func(c *Config) *string { return &c.TEE.TDX.MROwnerConfig }, emptyOr(hexBytes(abi.TDXDigestSize))),

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

// platforms lists the values of TEE.Platform. Package tee/abi says what they are.
func platforms() (names []string) {
	for _, p := range abi.Platforms() {
		names = append(names, string(p))
	}
	return names
}

// confidential reports whether the platform is any but that of ordinary VMs.
func (t TEE) confidential() bool { return abi.Platform(t.Platform).Confidential() }

// Architecture is the guest's: hypervisor.arch, or the host's where that is empty.
func (c *Config) Architecture() string {
	if c.Hypervisor.Arch != "" {
		return c.Hypervisor.Arch
	}
	return runtime.GOARCH
}

// commandLine stands for a file in the faults of what a user of a tool asked for.
const commandLine = "command line"

// WithPlatform returns a copy of c with another tee.platform, for tools that look at more than the configured one. Where
// hypervisor.arch is not set it becomes the platform's own. The name is checked, what the platform makes of the other
// settings is not (package tee/platform). The error is of type Faults.
func (c *Config) WithPlatform(platform string) (*Config, error) {
	n := c.clone()
	n.TEE.Platform = platform
	n.origins["tee.platform"] = origin{file: commandLine}
	if p := oneOf(platforms()...)(platform); p != nil {
		return nil, Faults{n.Fault("tee.platform", p.reason, p.fix)}
	}
	if arch := abi.Platform(platform).Architecture(); n.Hypervisor.Arch == "" && arch != "" && arch != runtime.GOARCH {
		n.Hypervisor.Arch = arch
	}
	return n, nil
}
