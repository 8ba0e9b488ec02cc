// SPDX-License-Identifier: Apache-2.0

package abi

// AMD SEV-SNP: SEV Secure Nested Paging Firmware ABI Specification (AMD 56860). Sizes are bytes.
const (
	// SNPHostDataSize is HOST_DATA's, which the host chooses at launch and the report shows.
	SNPHostDataSize = 32
	// SNPIDBlockSize and SNPIDAuthSize are those of the ID block and its authentication information, of which SNPIDSize is
	// the size of FAMILY_ID and of IMAGE_ID.
	SNPIDBlockSize = 96
	SNPIDAuthSize  = 4096
	SNPIDSize      = 16
	// SNPPolicyDebug is the bit of the guest's policy (section 4.3) that lets the host read and write the guest.
	SNPPolicyDebug uint64 = 1 << 19
)

// Intel TDX: TDX Module ABI Specification (Intel 348551), TD_PARAMS and TDINFO_STRUCT. Sizes are bytes.
const (
	// TDXDigestSize is the size of MRTD, of each RTMR, and of MRCONFIGID, MROWNER and MROWNERCONFIG (SHA-384).
	TDXDigestSize = 48
	// TDXAttributeDebug is the bit of ATTRIBUTES that lets the host read and write the guest.
	TDXAttributeDebug uint64 = 1 << 0
)

// BindingSize is the size in bytes of initdata's binding where no register of the hardware holds it but the kernel's
// command line (wire.ParamInitdata): the longest digest's; shorter digests are padded with zeros.
const BindingSize = 64
