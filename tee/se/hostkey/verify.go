// SPDX-License-Identifier: Apache-2.0

package hostkey

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/rsa"
	"crypto/x509"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"

	"github.com/cloister-project/cloister/tee/firmware"
)

// TrustFiles are paths of what a proof is made of, PEM or DER.
type TrustFiles struct {
	// Roots are the CA certificates that the caller trusts.
	Roots []string
	// Intermediates are CA certificates between a root and the signing key.
	Intermediates []string
	// SigningKeys are the certificates of IBM's key signing service.
	SigningKeys []string
	// CRLs are revocation lists: one of the root, one of each intermediate, one of each signing key.
	CRLs []string
}

// Verifier accepts host key documents by a proof out of given files. It does not change; all methods may be called from
// any goroutine.
type Verifier struct {
	signing []certificate
	crls    []crl
	now     time.Time
}

// minRSABits and minECBits are about 112 and 128 bits of strength.
const (
	minRSABits = 2048
	minECBits  = 256
)

var algorithms = []x509.SignatureAlgorithm{
	x509.SHA256WithRSA, x509.SHA384WithRSA, x509.SHA512WithRSA, x509.SHA256WithRSAPSS, x509.SHA384WithRSAPSS, x509.SHA512WithRSAPSS,
	x509.ECDSAWithSHA256, x509.ECDSAWithSHA384, x509.ECDSAWithSHA512,
}

// NewVerifier reads the files and checks everything above host key documents: that each signing key is IBM's by its
// subject, that it leads over at least one intermediate certificate to a root, and that nothing on the way is out of date
// or revoked. A fault is a *VerifyError.
func NewVerifier(files TrustFiles) (*Verifier, error) { return newVerifier(files, time.Now()) }

func newVerifier(files TrustFiles, now time.Time) (*Verifier, error) {
	v := &Verifier{now: now}
	var roots, intermediates []certificate
	for _, f := range []struct {
		paths []string
		to    *[]certificate
		what  string
	}{
		{files.Roots, &roots, "root CA certificate"},
		{files.Intermediates, &intermediates, "intermediate CA certificate"},
		{files.SigningKeys, &v.signing, "signing key certificate"},
	} {
		if len(f.paths) == 0 {
			return nil, fmt.Errorf("no %s is given: host key documents cannot be verified without (docs: confidential.md, Secure Execution): %w",
				f.what, errdefs.ErrInvalidArgument)
		}
		err := readFiles(f.paths, MaxCertificateFile, func(path string, b []byte) error {
			certs, err := parseCertificates(path, b)
			*f.to = append(*f.to, certs...)
			return err
		})
		if err != nil {
			return nil, err
		}
	}
	err := readFiles(files.CRLs, MaxCRLFile, func(path string, b []byte) error {
		lists, err := parseCRLs(path, b)
		v.crls = append(v.crls, lists...)
		return err
	})
	if err != nil {
		return nil, err
	}
	// A root's signature is its own and proves nothing.
	for _, c := range slices.Concat(roots, intermediates, v.signing) {
		if err := v.checkCertificate(c); err != nil {
			return nil, err
		}
	}
	for _, c := range slices.Concat(intermediates, v.signing) {
		if err := checkAlgorithm(c); err != nil {
			return nil, err
		}
	}
	for _, c := range v.signing {
		if err := checkSubject(c); err != nil {
			return nil, err
		}
		if err := v.checkChain(c, roots, intermediates); err != nil {
			return nil, err
		}
	}
	return v, nil
}

// checkCertificate is what holds for each certificate by itself.
func (v *Verifier) checkCertificate(c certificate) error {
	if v.now.Before(c.NotBefore) {
		return c.fail(CheckValidity, "check this machine's clock", "it is valid from %s on", c.NotBefore.UTC().Format(time.RFC3339))
	}
	if v.now.After(c.NotAfter) {
		return c.fail(CheckValidity, "get the current one", "it was valid until %s", c.NotAfter.UTC().Format(time.RFC3339))
	}
	if len(c.UnhandledCriticalExtensions) > 0 {
		return c.fail(CheckFile, "", "it has a critical extension that is not known: %s", c.UnhandledCriticalExtensions[0])
	}
	switch key := c.PublicKey.(type) {
	case *rsa.PublicKey:
		if key.N.BitLen() < minRSABits {
			return c.fail(CheckKey, "", "its RSA key has %d bits, at least %d are needed", key.N.BitLen(), minRSABits)
		}
	case *ecdsa.PublicKey:
		if key.Curve.Params().BitSize < minECBits {
			return c.fail(CheckKey, "", "its key is on curve %s, at least %d bits are needed", key.Curve.Params().Name, minECBits)
		}
	default:
		return c.fail(CheckKey, "", "its key is of a kind (%s) that is not accepted", c.PublicKeyAlgorithm)
	}
	return nil
}

func checkAlgorithm(c certificate) error {
	if !slices.Contains(algorithms, c.SignatureAlgorithm) {
		return c.fail(CheckAlgorithm, "", "it is signed with %s, which is not accepted", c.SignatureAlgorithm)
	}
	return nil
}

// What the subject of a key signing certificate says: IBM, "Introducing IBM Secure Execution for Linux" (SC34-7721),
// "Verifying the host key document". The signing keys of later machines are from Armonk.
const (
	ibm               = "International Business Machines Corporation"
	signingUnitSuffix = "Key Signing Service"
)

var signingLocalities = []string{"Poughkeepsie", "Armonk"}

func checkSubject(c certificate) error {
	s := c.Subject
	one := func(values []string, ok func(string) bool) bool { return len(values) == 1 && ok(values[0]) }
	is := func(want string) func(string) bool { return func(s string) bool { return s == want } }
	faults := []string{}
	for _, f := range []struct {
		ok   bool
		what string
	}{
		{len(s.Names) == 6, fmt.Sprintf("6 attributes (it has %d)", len(s.Names))},
		{one(s.Country, is("US")), `country "US"`},
		{one(s.Province, is("New York")), `state "New York"`},
		{one(s.Locality, func(l string) bool { return slices.Contains(signingLocalities, l) }), `locality "Poughkeepsie" or "Armonk"`},
		{one(s.Organization, is(ibm)), fmt.Sprintf("organization %q", ibm)},
		{one(s.OrganizationalUnit, func(u string) bool { return strings.HasSuffix(u, signingUnitSuffix) }),
			fmt.Sprintf("an organizational unit that ends in %q", signingUnitSuffix)},
		{s.CommonName == ibm, fmt.Sprintf("common name %q", ibm)},
	} {
		if !f.ok {
			faults = append(faults, f.what)
		}
	}
	if len(faults) > 0 {
		return c.fail(CheckSubject, "take the certificate of the IBM Z host key signing service",
			"its subject %q is not that of IBM's key signing service, which has %s", s, strings.Join(faults, ", "))
	}
	return nil
}

// checkChain finds a way from a signing key to a root, over at least one intermediate certificate, with nothing on it
// revoked.
func (v *Verifier) checkChain(signing certificate, roots, intermediates []certificate) error {
	options := x509.VerifyOptions{
		Roots: x509.NewCertPool(), Intermediates: x509.NewCertPool(), CurrentTime: v.now,
		KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny},
	}
	for _, c := range roots {
		options.Roots.AddCert(c.Certificate)
	}
	for _, c := range intermediates {
		options.Intermediates.AddCert(c.Certificate)
	}
	chains, err := signing.Verify(options)
	if err != nil {
		return signing.fail(CheckChain, "give the intermediate CA certificate that its issuer field names, and that one's root",
			"it does not lead to a given root: %v", err)
	}
	fault := signing.fail(CheckChain, "IBM's signing key is signed by an intermediate CA, never by a root",
		"there is no intermediate certificate between it and the root")
	for _, chain := range chains {
		if len(chain) < 3 {
			continue
		}
		if fault = v.checkRevocations(chain, slices.Concat(intermediates, []certificate{signing})); fault == nil {
			return nil
		}
	}
	return fault
}

// checkRevocations asks for each certificate of a chain but the root the revocation list of the one above it.
func (v *Verifier) checkRevocations(chain []*x509.Certificate, known []certificate) error {
	for i, c := range chain[:len(chain)-1] {
		named := certificate{c, c.Subject.String()}
		for _, k := range known {
			if k.Equal(c) {
				named = k
			}
		}
		if err := v.checkRevoked(named, chain[i+1]); err != nil {
			return err
		}
	}
	return nil
}

// VerifyFile verifies the document in a file.
func (v *Verifier) VerifyFile(path string) (*Document, error) {
	b, _, err := firmware.ReadFile(path, MaxCertificateFile)
	if err != nil {
		return nil, err
	}
	return v.Verify(path, b)
}

// Verify accepts a document that is of a signing key, in date, not revoked, and has a key of the right kind. name is for
// messages. A fault is a *VerifyError.
func (v *Verifier) Verify(name string, b []byte) (*Document, error) {
	d, c, err := parseDocument(name, b)
	if err != nil {
		return nil, err
	}
	if err := v.checkCertificate(c); err != nil {
		return nil, err
	}
	if err := checkAlgorithm(c); err != nil {
		return nil, err
	}
	signing, err := v.issuer(c)
	if err != nil {
		return nil, err
	}
	if err := v.checkRevoked(c, signing.Certificate); err != nil {
		return nil, err
	}
	d.Verified = true
	return d, nil
}

// issuer finds the signing key that signed a document.
func (v *Verifier) issuer(c certificate) (certificate, error) {
	var byName []certificate
	for _, s := range v.signing {
		if sameName(c.Issuer, s.Subject) && sameKeyID(c.AuthorityKeyId, s.SubjectKeyId) {
			byName = append(byName, s)
		}
	}
	if byName == nil {
		return certificate{}, c.fail(CheckIssuer, "give the certificate of the signing key that its issuer field names",
			"it is issued by %q with key %x, which is no given signing key", c.Issuer, c.AuthorityKeyId)
	}
	for _, s := range byName {
		// The signing key's certificate is not one of a CA, so that Certificate.CheckSignatureFrom does not take it.
		if s.CheckSignature(c.SignatureAlgorithm, c.RawTBSCertificate, c.Signature) == nil {
			return s, nil
		}
	}
	return certificate{}, c.fail(CheckSignature, "get the document anew from IBM; this one was changed or is forged",
		"it is not signed by the signing key that it names")
}

// sameKeyID compares key identifiers where both are there.
func sameKeyID(authority, subject []byte) bool {
	return len(authority) == 0 || len(subject) == 0 || bytes.Equal(authority, subject)
}
