// SPDX-License-Identifier: Apache-2.0

package hostkey

import (
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"fmt"
	"slices"
	"strings"
	"time"
)

// crl is a revocation list of a file.
type crl struct {
	*x509.RevocationList
	file string
}

func parseCRLs(file string, b []byte) ([]crl, error) {
	ders, err := blocks(file, b, pemCRL)
	if err != nil {
		return nil, err
	}
	var out []crl
	for _, der := range ders {
		l, err := x509.ParseRevocationList(der)
		if err != nil {
			return nil, &VerifyError{File: file, Check: CheckFile, Detail: fmt.Sprintf("it is no revocation list in PEM or DER: %v", err)}
		}
		out = append(out, crl{l, file})
	}
	return out, nil
}

// checkRevoked demands a list of the issuer that is in date, and that the certificate is on none of them.
func (v *Verifier) checkRevoked(c certificate, issuer *x509.Certificate) error {
	var usable []crl
	var why []string
	for _, l := range v.crls {
		if !sameName(l.Issuer, issuer.Subject) || !sameKeyID(l.AuthorityKeyId, issuer.SubjectKeyId) {
			continue
		}
		if fault := v.crlFault(l, c, issuer); fault != "" {
			why = append(why, l.file+" "+fault)
			continue
		}
		usable = append(usable, l)
	}
	if usable == nil {
		detail := fmt.Sprintf("none of the %d given revocation lists is of its issuer, %q", len(v.crls), issuer.Subject)
		if why != nil {
			detail = "no revocation list of its issuer can be used: " + strings.Join(why, ", ")
		}
		fix := "give the issuer's current list with --crl"
		if at := c.CRLDistributionPoints; len(at) > 0 {
			fix += ", it is published at " + at[0]
		}
		return c.fail(CheckCRL, fix, "%s", detail)
	}
	for _, l := range usable {
		for _, r := range l.RevokedCertificateEntries {
			if r.SerialNumber.Cmp(c.SerialNumber) == 0 {
				return c.fail(CheckRevoked, "do not use it: its private key may be known to others, or the machine is out of service",
					"%s revokes it since %s", l.file, r.RevocationTime.UTC().Format(time.RFC3339))
			}
		}
	}
	return nil
}

// crlFault says why a list with the issuer's name does not count for a certificate.
func (v *Verifier) crlFault(l crl, c certificate, issuer *x509.Certificate) string {
	switch {
	case issuer.IsCA && issuer.KeyUsage != 0 && issuer.KeyUsage&x509.KeyUsageCRLSign == 0:
		return "is of a CA that may not sign such lists"
	case !slices.Contains(algorithms, l.SignatureAlgorithm):
		return fmt.Sprintf("is signed with %s, which is not accepted", l.SignatureAlgorithm)
	// As with documents: a signing key's certificate is no CA's.
	case issuer.CheckSignature(l.SignatureAlgorithm, l.RawTBSRevocationList, l.Signature) != nil:
		return "is not signed by it"
	case v.now.Before(l.ThisUpdate):
		return "is of the future, " + l.ThisUpdate.UTC().Format(time.RFC3339)
	case l.NextUpdate.IsZero():
		return "has no date until which it counts"
	case !v.now.Before(l.NextUpdate):
		return "is out of date since " + l.NextUpdate.UTC().Format(time.RFC3339)
	}
	for _, e := range l.Extensions {
		switch {
		case e.Id.Equal(oidIssuingDistributionPoint):
			if !coversAll(e.Value, c) {
				return "is of a part of its certificates only"
			}
		case e.Critical:
			return "has a critical extension that is not known, " + e.Id.String()
		}
	}
	return ""
}

var oidIssuingDistributionPoint = asn1.ObjectIdentifier{2, 5, 29, 28}

// issuingDistributionPoint says which certificates a list covers: RFC 5280, 5.2.5.
type issuingDistributionPoint struct {
	Point struct {
		FullName     []asn1.RawValue `asn1:"optional,tag:0"`
		RelativeName asn1.RawValue   `asn1:"optional,tag:1"`
	} `asn1:"optional,tag:0"`
	OnlyUsers      bool           `asn1:"optional,tag:1"`
	OnlyCAs        bool           `asn1:"optional,tag:2"`
	Reasons        asn1.BitString `asn1:"optional,tag:3"`
	Indirect       bool           `asn1:"optional,tag:4"`
	OnlyAttributes bool           `asn1:"optional,tag:5"`
}

const uriName = 6 // GeneralName, uniformResourceIdentifier

// coversAll reports whether a list says of a certificate all there is to say: for any reason, and of the part that the
// certificate itself names.
func coversAll(value []byte, c certificate) bool {
	var p issuingDistributionPoint
	if rest, err := asn1.Unmarshal(value, &p); err != nil || len(rest) > 0 {
		return false
	}
	if p.Reasons.BitLength > 0 || p.Indirect || p.OnlyAttributes || p.OnlyUsers && c.IsCA || p.OnlyCAs && !c.IsCA {
		return false
	}
	if len(p.Point.FullName) == 0 {
		return len(p.Point.RelativeName.FullBytes) == 0
	}
	return slices.ContainsFunc(p.Point.FullName, func(n asn1.RawValue) bool {
		return n.Class == asn1.ClassContextSpecific && n.Tag == uriName && slices.Contains(c.CRLDistributionPoints, string(n.Bytes))
	})
}

// sameName compares names by their attributes in any order, and takes Armonk for Poughkeepsie: IBM's revocation lists and
// host key documents name the signing key in another order than its certificate does, and by the older place.
func sameName(a, b pkix.Name) bool {
	x, y := attributes(a), attributes(b)
	return len(x) > 0 && slices.Equal(x, y)
}

func attributes(n pkix.Name) []string {
	locality := []int{2, 5, 4, 7} // RFC 5280, appendix A: id-at-localityName
	var out []string
	for _, a := range n.Names {
		value := fmt.Sprint(a.Value)
		if a.Type.Equal(locality) && value == signingLocalities[1] {
			value = signingLocalities[0]
		}
		out = append(out, a.Type.String()+"="+value)
	}
	slices.Sort(out)
	return out
}
