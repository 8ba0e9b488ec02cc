// SPDX-License-Identifier: Apache-2.0

package snpreport

import (
	"encoding/binary"
	"fmt"
	"slices"

	"github.com/containerd/errdefs"
)

// Size of a report in bytes.
const Size = 0x4a0

// Versions of the structure that are known. Version 3 added the CPU's identification, version 5 the mitigation vectors.
const (
	MinVersion = 2
	MaxVersion = 5
)

// signedSize is how much of a report its signature covers.
const signedSize = 0x2a0

// Report is a report's content. Byte fields are as in the structure.
type Report struct {
	Version  uint32
	GuestSVN uint32
	Policy   uint64
	FamilyID [16]byte
	ImageID  [16]byte
	// VMPL of the guest's part that asked for the report.
	VMPL uint32
	// SignatureAlgo is 1 for ECDSA P-384 with SHA-384.
	SignatureAlgo uint32
	CurrentTCB    uint64
	PlatformInfo  uint64
	// AuthorKey: an author key signed the ID key.
	AuthorKey bool
	// MaskChipKey: the report is not signed, as the host wanted it.
	MaskChipKey bool
	// SigningKey is 0 for the VCEK, 1 for the VLEK, 7 for none.
	SigningKey uint8

	// ReportData is what the guest put in, a verifier's nonce as a rule.
	ReportData [64]byte
	// Measurement is the launch digest.
	Measurement [48]byte
	// HostData is what the host gave at launch, the initdata's digest.
	HostData        [32]byte
	IDKeyDigest     [48]byte
	AuthorKeyDigest [48]byte
	ReportID        [32]byte
	ReportIDMA      [32]byte
	ReportedTCB     uint64
	// CPU is family, model and stepping; zero before version 3.
	CPU          [3]uint8
	ChipID       [64]byte
	CommittedTCB uint64
	// CurrentBuild and CommittedBuild are the firmware's build, minor and major version.
	CurrentBuild, CommittedBuild [3]uint8
	LaunchTCB                    uint64
	// LaunchMitigations and CurrentMitigations are zero before version 5.
	LaunchMitigations, CurrentMitigations uint64

	// Signed is what Signature covers; Signature is r and s, 72 bytes each, little-endian, and unused space.
	Signed    []byte
	Signature [512]byte
}

// reader takes fields one after the other.
type reader struct {
	raw []byte
	at  int
	err error
}

func (r *reader) bytes(to []byte) {
	copy(to, r.raw[r.at:])
	r.at += len(to)
}

func (r *reader) u32() uint32 {
	r.at += 4
	return binary.LittleEndian.Uint32(r.raw[r.at-4:])
}

func (r *reader) u64() uint64 {
	r.at += 8
	return binary.LittleEndian.Uint64(r.raw[r.at-8:])
}

// reserved wants zeros up to an offset.
func (r *reader) reserved(end int) {
	if slices.ContainsFunc(r.raw[r.at:end], func(b byte) bool { return b != 0 }) && r.err == nil {
		r.err = malformed("its reserved bytes %#x to %#x are not zero", r.at, end-1)
	}
	r.at = end
}

// Parse reads a report. errdefs.ErrInvalidArgument: it is none, or one of a version that is not known. The bytes are not
// referred to afterwards.
func Parse(raw []byte) (*Report, error) {
	if len(raw) != Size {
		return nil, malformed("it has %d bytes, want %d", len(raw), Size)
	}
	r := reader{raw: raw}
	p := &Report{Version: r.u32()}
	if p.Version < MinVersion || p.Version > MaxVersion {
		return nil, malformed("version %d; known are %d to %d", p.Version, MinVersion, MaxVersion)
	}
	p.GuestSVN, p.Policy = r.u32(), r.u64()
	r.bytes(p.FamilyID[:])
	r.bytes(p.ImageID[:])
	p.VMPL, p.SignatureAlgo, p.CurrentTCB, p.PlatformInfo = r.u32(), r.u32(), r.u64(), r.u64()
	flags := r.u32()
	p.AuthorKey, p.MaskChipKey, p.SigningKey = flags&1 != 0, flags&2 != 0, uint8(flags>>2&7)
	r.reserved(0x50)
	for _, to := range [][]byte{p.ReportData[:], p.Measurement[:], p.HostData[:], p.IDKeyDigest[:], p.AuthorKeyDigest[:], p.ReportID[:],
		p.ReportIDMA[:]} {
		r.bytes(to)
	}
	p.ReportedTCB = r.u64()
	if p.Version >= 3 {
		r.bytes(p.CPU[:])
	}
	r.reserved(0x1a0)
	r.bytes(p.ChipID[:])
	p.CommittedTCB = r.u64()
	r.bytes(p.CurrentBuild[:])
	r.reserved(0x1ec)
	r.bytes(p.CommittedBuild[:])
	r.reserved(0x1f0)
	p.LaunchTCB = r.u64()
	if p.Version >= 5 {
		p.LaunchMitigations, p.CurrentMitigations = r.u64(), r.u64()
	}
	r.reserved(signedSize)
	r.bytes(p.Signature[:])
	p.Signed = slices.Clone(raw[:signedSize])
	const numbers = 2 * 72
	switch {
	case r.err != nil:
		return nil, r.err
	case flags>>5 != 0:
		return nil, malformed("its flags %#x have reserved bits", flags)
	case p.Policy&(1<<17) == 0:
		return nil, malformed("its policy %#x lacks bit 17, which is always one", p.Policy)
	case p.VMPL > 3 && p.VMPL != 0xffffffff:
		return nil, malformed("VMPL %d; possible are 0 to 3", p.VMPL)
	case slices.ContainsFunc(p.Signature[numbers:], func(b byte) bool { return b != 0 }):
		return nil, malformed("something is behind its signature")
	}
	return p, nil
}

func malformed(format string, a ...any) error {
	return fmt.Errorf("the SEV-SNP attestation report is malformed: "+format+": %w", append(a, errdefs.ErrInvalidArgument)...)
}
