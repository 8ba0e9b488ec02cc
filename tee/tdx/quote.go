// SPDX-License-Identifier: Apache-2.0

package tdx

import (
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"

	"github.com/containerd/errdefs"

	"github.com/cloister-project/cloister/tee"
)

// Quotes: Intel TDX DCAP Quoting Library API, appendix A.3 (version 4) and A.4 (version 5).
const (
	quoteHeaderSize = 48
	quoteVersion4   = 4
	quoteVersion5   = 5
	quoteTEETDX     = 0x81
	quoteECDSAP256  = 2
	quoteECDSAP384  = 3
	bodyTD10        = 2
	bodyTD15        = 3
	bodyTD10Size    = 584
	bodyTD15Size    = 648
	// maxQuote is what Linux hands out at most (configfs-tsm's outblob), in bytes.
	maxQuote = 32 << 10
)

// Quote is what a TDX quote says. Nothing of it is verified: the signature, its certificates and the platform's TCB are a
// verifier's work.
type Quote struct {
	Version            uint16
	AttestationKeyType uint16
	TEETCBSVN          [16]byte
	MRSEAM             Digest
	MRSignerSEAM       Digest
	SEAMAttributes     uint64
	Attributes         uint64
	XFAM               uint64
	MRTD               Digest
	MRConfigID         Digest
	MROwner            Digest
	MROwnerConfig      Digest
	RTMR               [4]Digest
	ReportData         [64]byte
	// TEETCBSVN2 and MRServiceTD are in quotes of TDX 1.5 only (HasTD15).
	HasTD15     bool
	TEETCBSVN2  [16]byte
	MRServiceTD Digest
	// Signature is the signature part, not looked into.
	Signature []byte
}

// ParseQuote reads a quote. Behind its end only zeros are accepted. errdefs.ErrInvalidArgument: it is none.
func ParseQuote(raw []byte) (*Quote, error) {
	le := binary.LittleEndian
	if len(raw) < quoteHeaderSize || len(raw) > maxQuote {
		return nil, notQuote("%d bytes, want %d to %d", len(raw), quoteHeaderSize, maxQuote)
	}
	q := &Quote{Version: le.Uint16(raw), AttestationKeyType: le.Uint16(raw[2:])}
	if kind := le.Uint32(raw[4:]); kind != quoteTEETDX {
		return nil, notQuote("TEE type %#x, want %#x", kind, quoteTEETDX)
	}
	if k := q.AttestationKeyType; k != quoteECDSAP256 && k != quoteECDSAP384 {
		return nil, notQuote("attestation key type %d", k)
	}
	rest := raw[quoteHeaderSize:]
	size := bodyTD10Size
	switch q.Version {
	case quoteVersion4:
	case quoteVersion5:
		if len(rest) < 6 {
			return nil, notQuote("it ends in front of the body's type")
		}
		kind, told := le.Uint16(rest), le.Uint32(rest[2:])
		rest = rest[6:]
		switch kind {
		case bodyTD10:
		case bodyTD15:
			size, q.HasTD15 = bodyTD15Size, true
		default:
			return nil, notQuote("body type %d is none of a TD", kind)
		}
		if told != uint32(size) {
			return nil, notQuote("a body of %d bytes, type %d has %d", told, kind, size)
		}
	default:
		return nil, notQuote("version %d, known are %d and %d", q.Version, quoteVersion4, quoteVersion5)
	}
	if len(rest) < size+4 {
		return nil, notQuote("it ends inside the body or in front of the signature")
	}
	q.body(rest[:size])
	rest = rest[size:]
	told := le.Uint32(rest)
	rest = rest[4:]
	if uint64(told) > uint64(len(rest)) || told == 0 {
		return nil, notQuote("a signature of %d bytes in %d", told, len(rest))
	}
	q.Signature = append([]byte(nil), rest[:told]...)
	for _, b := range rest[told:] {
		if b != 0 {
			return nil, notQuote("something follows its end")
		}
	}
	return q, nil
}

func (q *Quote) body(b []byte) {
	take := func(to []byte) {
		copy(to, b)
		b = b[len(to):]
	}
	number := func(to *uint64) {
		*to = binary.LittleEndian.Uint64(b)
		b = b[8:]
	}
	take(q.TEETCBSVN[:])
	take(q.MRSEAM[:])
	take(q.MRSignerSEAM[:])
	number(&q.SEAMAttributes)
	number(&q.Attributes)
	number(&q.XFAM)
	take(q.MRTD[:])
	take(q.MRConfigID[:])
	take(q.MROwner[:])
	take(q.MROwnerConfig[:])
	for n := range q.RTMR {
		take(q.RTMR[n][:])
	}
	take(q.ReportData[:])
	if q.HasTD15 {
		take(q.TEETCBSVN2[:])
		take(q.MRServiceTD[:])
	}
}

func notQuote(format string, args ...any) error {
	return fmt.Errorf("no TDX quote: "+format+": %w", append(args, errdefs.ErrInvalidArgument)...)
}

// Compare tells where the quote differs from what Measure predicted; all differences are one error,
// errdefs.ErrFailedPrecondition. Registers without a predicted value are passed over. Of MRTD either variant fits, and the
// attribute PKS, which the host's CPU decides, may be there or not.
func (q *Quote) Compare(want *tee.ReferenceValues) error {
	if want == nil || want.Platform != tee.TDX {
		return fmt.Errorf("these reference values are not of TDX: %w", errdefs.ErrInvalidArgument)
	}
	values := map[string]string{}
	for _, v := range want.Values {
		values[v.Name] = v.Hex
	}
	var faults []error
	differs := func(name, got string) {
		faults = append(faults, fmt.Errorf("%s is %s, predicted was %s", name, got, values[name]))
	}
	if got := q.MRTD.String(); got != values["tdx.mrtd"] && got != values["tdx.mrtd_two_pass"] {
		differs("tdx.mrtd", got)
	}
	for name, got := range map[string]Digest{"tdx.rtmr0": q.RTMR[0], "tdx.rtmr1": q.RTMR[1], "tdx.rtmr2": q.RTMR[2]} {
		if want := values[name]; want != "" && got.String() != want {
			differs(name, got.String())
		}
	}
	if got := q.MRConfigID.String(); got != values["tdx.mrconfigid"] {
		differs("tdx.mrconfigid", got)
	}
	attributes := func(a uint64) string { return hex.EncodeToString(binary.LittleEndian.AppendUint64(nil, a)) }
	if w := values["tdx.attributes"]; w != attributes(q.Attributes) && w != attributes(q.Attributes&^AttributePKS) {
		differs("tdx.attributes", attributes(q.Attributes))
	}
	if len(faults) > 0 {
		return fmt.Errorf("the quote is not of this launch: %w (%w)", errors.Join(faults...), errdefs.ErrFailedPrecondition)
	}
	return nil
}
