// SPDX-License-Identifier: Apache-2.0

package report

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/cloister-project/cloister/tee/abi"
)

// ATTESTATION_REPORT of SEV-SNP: AMD 56860, table "ATTESTATION_REPORT Structure". Offsets and sizes in bytes.
const (
	snpSize       = 0x4a0
	snpVersion    = 0x00 // u32
	snpPolicy     = 0x08 // u64
	snpReportData = 0x50
	snpHostData   = 0xc0
	// Versions 2 to 5 have the fields above at the same places.
	snpOldest, snpNewest = 2, 5
)

// parseSNP reads an attestation report as the secure processor gave it.
func parseSNP(raw []byte, nonce [NonceSize]byte) (*Launch, error) {
	if len(raw) != snpSize {
		return nil, fmt.Errorf("SEV-SNP report has %d bytes, not %d", len(raw), snpSize)
	}
	if v := binary.LittleEndian.Uint32(raw[snpVersion:]); v < snpOldest || v > snpNewest {
		return nil, fmt.Errorf("SEV-SNP report has version %d; versions %d to %d are known", v, snpOldest, snpNewest)
	}
	if !bytes.Equal(raw[snpReportData:snpReportData+NonceSize], nonce[:]) {
		return nil, errNonce
	}
	return &Launch{
		Platform: abi.SNP,
		Bound:    bytes.Clone(raw[snpHostData : snpHostData+abi.SNPHostDataSize]),
		Debug:    binary.LittleEndian.Uint64(raw[snpPolicy:])&abi.SNPPolicyDebug != 0,
	}, nil
}

// TDREPORT_STRUCT: Intel TDX Module ABI Reference Specification, "Measurement and Attestation Types": REPORTMACSTRUCT
// (256 bytes), TEE_TCB_INFO (239), 17 reserved bytes, TDINFO_STRUCT (512). Offsets and sizes in bytes.
const (
	tdxSize       = 1024
	tdxType       = 0 // REPORTTYPE: type, subtype, version, reserved
	tdxReportData = 128
	tdxInfo       = 512 // TDINFO_STRUCT: ATTRIBUTES (8), XFAM (8), MRTD (48), MRCONFIGID (48), …
	tdxAttributes = tdxInfo
	tdxMRConfigID = tdxInfo + 64

	tdxTypeTD = 0x81
)

// parseTDX reads a TDREPORT as the TDX module gave it.
func parseTDX(raw []byte, nonce [NonceSize]byte) (*Launch, error) {
	if len(raw) != tdxSize {
		return nil, fmt.Errorf("TDREPORT has %d bytes, not %d", len(raw), tdxSize)
	}
	// Version 1 differs from 0 in what else is hashed (service TDs).
	if t := raw[tdxType : tdxType+4]; t[0] != tdxTypeTD || t[1] != 0 || t[2] > 1 || t[3] != 0 {
		return nil, fmt.Errorf("TDREPORT has type % x; a TD's is 81 00 00 00 or 81 00 01 00", t)
	}
	if !bytes.Equal(raw[tdxReportData:tdxReportData+NonceSize], nonce[:]) {
		return nil, errNonce
	}
	return &Launch{
		Platform: abi.TDX,
		Bound:    bytes.Clone(raw[tdxMRConfigID : tdxMRConfigID+abi.TDXDigestSize]),
		Debug:    binary.LittleEndian.Uint64(raw[tdxAttributes:])&abi.TDXAttributeDebug != 0,
	}, nil
}

var errNonce = errors.New("the report does not echo what was asked: it is another one's, or an old one")
