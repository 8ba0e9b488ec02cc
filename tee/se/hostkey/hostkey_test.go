// SPDX-License-Identifier: Apache-2.0

package hostkey

import (
	"bytes"
	"crypto"
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"fmt"
	"math/big"
	mathrand "math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
)

var now = time.Date(2026, 5, 1, 12, 0, 0, 0, time.UTC)

// entity is a certificate with its key.
type entity struct {
	cert *x509.Certificate
	key  crypto.Signer
}

// pki makes a root, an intermediate CA, a signing key and a host key document, with their lists, all of today. A test
// changes one thing.
type pki struct {
	t                           testing.TB
	dir                         string
	root, inter, signing, host  entity
	rootCRL, interCRL, signCRL  *x509.RevocationList
	files                       TrustFiles
	document                    string
	interTmpl, signTmpl, hkTmpl *x509.Certificate
	hostKey                     crypto.Signer
}

func signingName(locality string) pkix.Name {
	return pkix.Name{
		Country: []string{"US"}, Province: []string{"New York"}, Locality: []string{locality}, Organization: []string{ibm},
		OrganizationalUnit: []string{"IBM Z Host Key Signing Service"}, CommonName: ibm,
	}
}

func newECKey(t testing.TB, curve elliptic.Curve) crypto.Signer {
	key, err := ecdsa.GenerateKey(curve, rand.Reader)
	require.NoError(t, err)
	return key
}

func template(name pkix.Name, serial int64) *x509.Certificate {
	return &x509.Certificate{
		SerialNumber: big.NewInt(serial), Subject: name, NotBefore: now.Add(-time.Hour), NotAfter: now.Add(24 * time.Hour),
		BasicConstraintsValid: true,
	}
}

func caTemplate(name string, serial int64) *x509.Certificate {
	c := template(pkix.Name{CommonName: name}, serial)
	c.IsCA, c.KeyUsage = true, x509.KeyUsageCertSign|x509.KeyUsageCRLSign
	return c
}

func newPKI(t testing.TB) *pki {
	p := &pki{t: t, dir: t.TempDir(), hostKey: newECKey(t, elliptic.P521())}
	p.root.key, p.inter.key, p.signing.key = newECKey(t, elliptic.P256()), newECKey(t, elliptic.P256()), newECKey(t, elliptic.P256())
	p.root.cert = p.sign(caTemplate("root", 1), entity{caTemplate("root", 1), p.root.key}, p.root.key)
	p.interTmpl = caTemplate("intermediate", 2)
	p.signTmpl = template(signingName("Poughkeepsie"), 3)
	p.signTmpl.SubjectKeyId = []byte{3, 3}
	p.hkTmpl = template(pkix.Name{CommonName: "host"}, 4)
	list := func(number int64) *x509.RevocationList {
		return &x509.RevocationList{Number: big.NewInt(number), ThisUpdate: now.Add(-time.Hour), NextUpdate: now.Add(time.Hour)}
	}
	p.rootCRL, p.interCRL, p.signCRL = list(1), list(2), list(3)
	return p
}

func (p *pki) sign(tmpl *x509.Certificate, by entity, key crypto.Signer) *x509.Certificate {
	der, err := x509.CreateCertificate(rand.Reader, tmpl, by.cert, key.Public(), by.key)
	require.NoError(p.t, err)
	c, err := x509.ParseCertificate(der)
	require.NoError(p.t, err)
	return c
}

// list signs a revocation list; crypto/x509 wants its issuer to be a CA, which IBM's signing key is not.
func (p *pki) list(tmpl *x509.RevocationList, by entity) []byte {
	issuer := *by.cert
	issuer.KeyUsage |= x509.KeyUsageCRLSign
	der, err := x509.CreateRevocationList(rand.Reader, tmpl, &issuer, by.key)
	require.NoError(p.t, err)
	return pem.EncodeToMemory(&pem.Block{Type: pemCRL, Bytes: der})
}

func (p *pki) write(name string, b []byte) string {
	path := filepath.Join(p.dir, name)
	require.NoError(p.t, os.WriteFile(path, b, 0o600))
	return path
}

func certPEM(c *x509.Certificate) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: pemCertificate, Bytes: c.Raw})
}

// finish signs what the test left and writes all files.
func (p *pki) finish() *pki {
	if p.inter.cert == nil {
		p.inter.cert = p.sign(p.interTmpl, p.root, p.inter.key)
	}
	if p.signing.cert == nil {
		p.signing.cert = p.sign(p.signTmpl, p.inter, p.signing.key)
	}
	if p.host.cert == nil {
		p.host = entity{p.sign(p.hkTmpl, p.signing, p.hostKey), p.hostKey}
	}
	p.files = TrustFiles{
		Roots:         []string{p.write("root.crt", certPEM(p.root.cert))},
		Intermediates: []string{p.write("inter.crt", certPEM(p.inter.cert))},
		SigningKeys:   []string{p.write("signing.crt", p.signing.cert.Raw)}, // DER
		CRLs: []string{
			p.write("root.crl", p.list(p.rootCRL, p.root)), p.write("inter.crl", p.list(p.interCRL, p.inter)), p.write("signing.crl",
				p.list(p.signCRL, p.signing)),
		},
	}
	p.document = p.write("host.crt", certPEM(p.host.cert))
	return p
}

func (p *pki) verify() (*Document, error) {
	v, err := newVerifier(p.files, now)
	if err != nil {
		return nil, err
	}
	return v.VerifyFile(p.document)
}

func TestVerify(t *testing.T) {
	p := newPKI(t).finish()
	d, err := p.verify()
	require.NoError(t, err)
	require.True(t, d.Verified)
	require.Empty(t, d.Warning())
	require.Equal(t, "4", d.Serial)
	want, err := p.hostKey.Public().(*ecdsa.PublicKey).ECDH()
	require.NoError(t, err)
	require.True(t, want.Equal(d.Key))
	hash, err := Hash(want)
	require.NoError(t, err)
	require.Equal(t, hash, d.Hash)

	d, err = ReadUnverified(p.document)
	require.NoError(t, err)
	require.False(t, d.Verified)
	require.Contains(t, d.Warning(), "NOT VERIFIED")
	require.Contains(t, d.Warning(), p.document)
	require.Contains(t, d.Warning(), fmt.Sprintf("%x", hash))
}

func TestVerifyWithSeveralSigningKeysAndArmonk(t *testing.T) {
	p := newPKI(t).finish()
	other := newPKI(t)
	other.signTmpl.Subject = signingName("Armonk")
	other.signTmpl.SubjectKeyId = []byte{9}
	other.finish()
	p.files.Roots = append(p.files.Roots, other.files.Roots...)
	p.files.Intermediates = append(p.files.Intermediates, other.files.Intermediates...)
	p.files.SigningKeys = append(p.files.SigningKeys, other.files.SigningKeys...)
	p.files.CRLs = append(p.files.CRLs, other.files.CRLs...)
	for _, document := range []string{p.document, other.document} {
		v, err := newVerifier(p.files, now)
		require.NoError(t, err)
		_, err = v.VerifyFile(document)
		require.NoError(t, err)
	}
}

// TestNamesInAnotherOrder: documents and lists that name the signing key in another order, and by its older place.
func TestNamesInAnotherOrder(t *testing.T) {
	p := newPKI(t)
	p.signTmpl.Subject = signingName("Armonk")
	p.inter.cert = p.sign(p.interTmpl, p.root, p.inter.key)
	p.signing.cert = p.sign(p.signTmpl, p.inter, p.signing.key)
	alias := *p.signing.cert
	older := signingName("Poughkeepsie").ToRDNSequence()
	older[0], older[2] = older[2], older[0]
	raw, err := asn1.Marshal(older)
	require.NoError(t, err)
	alias.RawSubject = raw
	p.host.cert = p.sign(p.hkTmpl, entity{&alias, p.signing.key}, p.hostKey)
	p.finish()
	p.files.CRLs[2] = p.write("signing.crl", p.list(p.signCRL, entity{&alias, p.signing.key}))
	require.NotEqual(t, p.host.cert.RawIssuer, p.signing.cert.RawSubject)
	_, err = p.verify()
	require.NoError(t, err)
}

func TestVerifyRefuses(t *testing.T) {
	old := func(c *x509.Certificate) { c.NotAfter = now.Add(-time.Minute) }
	tests := map[string]struct {
		change func(p *pki) // before signing
		after  func(p *pki) // after writing
		file   string
		check  Check
		says   string
	}{
		"document expired": {change: func(p *pki) { old(p.hkTmpl) }, file: "host.crt", check: CheckValidity,
			says: "valid until 2026-05-01T11:59:00Z"},
		"document of the future": {change: func(p *pki) { p.hkTmpl.NotBefore = now.Add(time.Minute) }, file: "host.crt", check: CheckValidity,
			says: "clock"},
		"signing key expired":  {change: func(p *pki) { old(p.signTmpl) }, file: "signing.crt", check: CheckValidity},
		"intermediate expired": {change: func(p *pki) { old(p.interTmpl) }, file: "inter.crt", check: CheckValidity},
		"root expired": {change: func(p *pki) {
			c := caTemplate("root", 1)
			old(c)
			p.root.cert = p.sign(c, entity{c, p.root.key}, p.root.key)
		}, file: "root.crt", check: CheckValidity},
		"document revoked": {change: func(p *pki) { p.signCRL.RevokedCertificateEntries = revoked(4) }, file: "host.crt", check: CheckRevoked,
			says: "since 2026-05-01"},
		"signing key revoked": {change: func(p *pki) { p.interCRL.RevokedCertificateEntries = revoked(3) }, file: "signing.crt",
			check: CheckRevoked},
		"intermediate revoked": {change: func(p *pki) { p.rootCRL.RevokedCertificateEntries = revoked(2) }, file: "inter.crt",
			check: CheckRevoked},
		"another curve": {change: func(p *pki) { p.hostKey = newECKey(p.t, elliptic.P384()) }, file: "host.crt", check: CheckKey,
			says: "P-384"},
		"another kind": {change: func(p *pki) { p.hostKey = newRSAKey(p.t, 2048) }, file: "host.crt", check: CheckKey, says: "RSA"},
		"weak RSA key": {change: func(p *pki) { p.signing.key = newRSAKey(p.t, 1024) }, file: "signing.crt", check: CheckKey,
			says: "1024 bits"},
		"weak curve": {change: func(p *pki) { p.signing.key = newECKey(p.t, elliptic.P224()) }, file: "signing.crt", check: CheckKey,
			says: "P-224"},
		"wrong locality": {change: func(p *pki) { p.signTmpl.Subject = signingName("Boeblingen") }, file: "signing.crt",
			check: CheckSubject, says: "Poughkeepsie"},
		"wrong unit": {change: func(p *pki) { p.signTmpl.Subject.OrganizationalUnit = []string{"Sales"} }, file: "signing.crt",
			check: CheckSubject, says: "organizational unit"},
		"wrong name": {change: func(p *pki) { p.signTmpl.Subject.CommonName = "evil" }, file: "signing.crt", check: CheckSubject,
			says: "common name"},
		"wrong country": {change: func(p *pki) { p.signTmpl.Subject.Country = []string{"DE"} }, file: "signing.crt", check: CheckSubject,
			says: "country"},
		"wrong state": {change: func(p *pki) { p.signTmpl.Subject.Province = nil }, file: "signing.crt", check: CheckSubject,
			says: "state"},
		"wrong organization": {change: func(p *pki) { p.signTmpl.Subject.Organization = []string{"IBM"} }, file: "signing.crt",
			check: CheckSubject, says: "organization"},
		"more attributes": {change: func(p *pki) { p.signTmpl.Subject.SerialNumber = "1" }, file: "signing.crt", check: CheckSubject,
			says: "has 7"},
		"another issuer": {change: func(p *pki) {
			p.host.cert = p.sign(p.hkTmpl, entity{caTemplate("other", 7), p.signing.key}, p.hostKey)
		}, file: "host.crt", check: CheckIssuer, says: "no given signing key"},
		"another key of the issuer": {change: func(p *pki) {
			c := template(signingName("Poughkeepsie"), 3)
			c.SubjectKeyId = []byte{3, 4}
			p.host.cert = p.sign(p.hkTmpl, entity{c, p.signing.key}, p.hostKey)
		}, file: "host.crt", check: CheckIssuer, says: "0304"},
		"forged": {change: func(p *pki) {
			c := template(signingName("Poughkeepsie"), 3)
			c.SubjectKeyId = []byte{3, 3}
			p.host.cert = p.sign(p.hkTmpl, entity{c, newECKey(p.t, elliptic.P256())}, p.hostKey)
		}, file: "host.crt", check: CheckSignature},
		"changed": {after: func(p *pki) {
			raw := bytes.Clone(p.host.cert.Raw)
			at := bytes.Index(raw, []byte("host"))
			raw[at] = 'm'
			p.write("host.crt", raw)
		}, file: "host.crt", check: CheckSignature},
		"signing key right below the root": {change: func(p *pki) {
			p.signing.cert = p.sign(p.signTmpl, p.root, p.signing.key)
		}, file: "signing.crt", check: CheckChain, says: "no intermediate"},
		"signing key of another CA": {change: func(p *pki) {
			p.signing.cert = p.sign(p.signTmpl, entity{caTemplate("intermediate", 2), newECKey(p.t, elliptic.P256())}, p.signing.key)
		}, file: "signing.crt", check: CheckChain},
		"another root": {after: func(p *pki) { p.files.Roots = newPKI(p.t).finish().files.Roots }, file: "signing.crt",
			check: CheckChain},
		"intermediate is no CA": {change: func(p *pki) { p.interTmpl.IsCA, p.interTmpl.KeyUsage, p.interTmpl.SubjectKeyId = false, 0, []byte{2} },
			file: "signing.crt", check: CheckChain},
		"critical extension": {change: func(p *pki) {
			p.hkTmpl.ExtraExtensions = []pkix.Extension{{Id: asn1.ObjectIdentifier{1, 2, 3}, Critical: true, Value: []byte{5, 0}}}
		}, file: "host.crt", check: CheckFile, says: "1.2.3"},
		"no list":             {after: func(p *pki) { p.files.CRLs = p.files.CRLs[:2] }, file: "host.crt", check: CheckCRL, says: "--crl"},
		"no list of the root": {after: func(p *pki) { p.files.CRLs = p.files.CRLs[1:] }, file: "inter.crt", check: CheckCRL},
		"no list of the CA": {after: func(p *pki) { p.files.CRLs = []string{p.files.CRLs[0], p.files.CRLs[2]} }, file: "signing.crt",
			check: CheckCRL},
		"list expired": {change: func(p *pki) { p.signCRL.NextUpdate = now }, file: "host.crt", check: CheckCRL, says: "out of date"},
		"list of the CA expired": {change: func(p *pki) { p.interCRL.NextUpdate = now.Add(-time.Minute) }, file: "signing.crt", check: CheckCRL,
			says: "out of date"},
		"list of the future": {change: func(p *pki) { p.signCRL.ThisUpdate = now.Add(time.Minute) }, file: "host.crt", check: CheckCRL,
			says: "future"},
		"list of another issuer": {after: func(p *pki) {
			p.files.CRLs[2] = p.write("x.crl", p.list(p.signCRL, entity{p.inter.cert, p.inter.key}))
		}, file: "host.crt", check: CheckCRL, says: "none of the 3"},
		"list of another key": {after: func(p *pki) {
			p.files.CRLs[2] = p.write("x.crl", p.list(p.signCRL, entity{p.signing.cert, newECKey(p.t, elliptic.P256())}))
		}, file: "host.crt", check: CheckCRL, says: "not signed"},
		"list with a critical extension": {change: func(p *pki) {
			p.signCRL.ExtraExtensions = []pkix.Extension{{Id: asn1.ObjectIdentifier{1, 2, 3}, Critical: true, Value: []byte{5, 0}}}
		}, file: "host.crt", check: CheckCRL, says: "critical"},
		"list of CA certificates only": {change: func(p *pki) {
			p.signCRL.ExtraExtensions = []pkix.Extension{distributionPoint(p.t, issuingDistributionPoint{OnlyCAs: true})}
		}, file: "host.crt", check: CheckCRL, says: "a part"},
		"list for some reasons": {change: func(p *pki) {
			p.signCRL.ExtraExtensions = []pkix.Extension{distributionPoint(p.t,
				issuingDistributionPoint{Reasons: asn1.BitString{Bytes: []byte{0x40}, BitLength: 2}})}
		}, file: "host.crt", check: CheckCRL, says: "a part"},
		"list of another part": {change: func(p *pki) {
			p.hkTmpl.CRLDistributionPoints = []string{"http://crl.example/1"}
			p.signCRL.ExtraExtensions = []pkix.Extension{uriPoint(p.t, "http://crl.example/2")}
		}, file: "host.crt", check: CheckCRL, says: "published at http://crl.example/1"},
		"CA may not sign lists": {change: func(p *pki) { p.interTmpl.KeyUsage = x509.KeyUsageCertSign }, file: "signing.crt",
			check: CheckCRL, says: "may not sign"},
		"two certificates in a document": {after: func(p *pki) { p.write("host.crt", append(certPEM(p.host.cert), certPEM(p.host.cert)...)) },
			file: "host.crt", check: CheckFile, says: "2 certificates"},
		"a private key beside it": {after: func(p *pki) {
			p.write("host.crt", append(certPEM(p.host.cert), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY"})...))
		}, file: "host.crt", check: CheckFile, says: "PRIVATE KEY"},
		"no certificate": {after: func(p *pki) { p.write("host.crt", []byte("hello")) }, file: "host.crt", check: CheckFile},
		"no list in it": {after: func(p *pki) { p.write("inter.crl", certPEM(p.inter.cert)) }, file: "inter.crl", check: CheckFile,
			says: "CERTIFICATE"},
		"too many in a file": {after: func(p *pki) { p.write("inter.crt", bytes.Repeat(certPEM(p.inter.cert), MaxPerFile+1)) }, file: "inter.crt",
			check: CheckFile, says: "more than 16"},
		"too many files": {after: func(p *pki) {
			for range MaxFiles {
				p.files.CRLs = append(p.files.CRLs, p.files.CRLs[0])
			}
		}, file: "root.crl", check: CheckFile, says: "67 files"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			p := newPKI(t)
			if tt.change != nil {
				tt.change(p)
			}
			p.finish()
			if tt.after != nil {
				tt.after(p)
			}
			d, err := p.verify()
			require.Nil(t, d)
			var fault *VerifyError
			require.ErrorAs(t, err, &fault)
			require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
			require.Equal(t, tt.check, fault.Check, "%v", err)
			require.Equal(t, tt.file, filepath.Base(fault.File), "%v", err)
			require.ErrorContains(t, err, tt.says)
		})
	}
}

func revoked(serial int64) []x509.RevocationListEntry {
	return []x509.RevocationListEntry{{SerialNumber: big.NewInt(99), RevocationTime: now},
		{SerialNumber: big.NewInt(serial), RevocationTime: now}}
}

func newRSAKey(t testing.TB, bits int) crypto.Signer {
	key, err := rsa.GenerateKey(rand.Reader, bits)
	require.NoError(t, err)
	return key
}

func distributionPoint(t testing.TB, p issuingDistributionPoint) pkix.Extension {
	value, err := asn1.Marshal(p)
	require.NoError(t, err)
	return pkix.Extension{Id: oidIssuingDistributionPoint, Critical: true, Value: value}
}

func uriPoint(t testing.TB, uri string) pkix.Extension {
	var p issuingDistributionPoint
	p.Point.FullName = []asn1.RawValue{{Class: asn1.ClassContextSpecific, Tag: uriName, Bytes: []byte(uri)}}
	return distributionPoint(t, p)
}

func TestPartialListThatFits(t *testing.T) {
	p := newPKI(t)
	p.hkTmpl.CRLDistributionPoints = []string{"http://crl.example/1"}
	p.signCRL.ExtraExtensions = []pkix.Extension{uriPoint(t, "http://crl.example/1")}
	_, err := p.finish().verify()
	require.NoError(t, err)
}

func TestVerifierNeedsAllKinds(t *testing.T) {
	for name, change := range map[string]func(*TrustFiles){
		"root CA":         func(f *TrustFiles) { f.Roots = nil },
		"intermediate CA": func(f *TrustFiles) { f.Intermediates = nil },
		"signing key":     func(f *TrustFiles) { f.SigningKeys = nil },
	} {
		p := newPKI(t).finish()
		change(&p.files)
		_, err := NewVerifier(p.files)
		require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
		require.ErrorContains(t, err, name)
	}
	p := newPKI(t).finish()
	p.files.Roots = []string{filepath.Join(p.dir, "none")}
	_, err := NewVerifier(p.files)
	require.ErrorIs(t, err, os.ErrNotExist)
	_, err = ReadUnverified(p.write("large", make([]byte, MaxCertificateFile+1)))
	require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
}

func testKey(t testing.TB, n byte) *ecdh.PrivateKey {
	key, err := NewKey(mathrand.NewChaCha8([32]byte{n}))
	require.NoError(t, err)
	return key
}

func TestCoordinates(t *testing.T) {
	key := testKey(t, 1).PublicKey()
	c, err := Coordinates(key)
	require.NoError(t, err)
	point := key.Bytes()
	require.Equal(t, make([]byte, 14), c[:14])
	require.Equal(t, point[1:67], c[14:80])
	require.Equal(t, make([]byte, 14), c[80:94])
	require.Equal(t, point[67:], c[94:])
	back, err := ParseCoordinates(c[:])
	require.NoError(t, err)
	require.True(t, key.Equal(back))
	hash, err := Hash(key)
	require.NoError(t, err)
	require.Equal(t, sha256.Sum256(c[:]), hash)

	for _, change := range []func([]byte) []byte{
		func(b []byte) []byte { return b[1:] },
		func(b []byte) []byte { b[0] = 1; return b },
		func(b []byte) []byte { b[80] = 1; return b },
		func(b []byte) []byte { b[100] ^= 1; return b },
		func(b []byte) []byte { clear(b); return b },
	} {
		_, err := ParseCoordinates(change(bytes.Clone(c[:])))
		require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
	}
	other, err := ecdh.P256().GenerateKey(rand.Reader)
	require.NoError(t, err)
	_, err = Coordinates(other.PublicKey())
	require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
	_, err = Coordinates(nil)
	require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
}

func TestSlots(t *testing.T) {
	own, host, other := testKey(t, 1), testKey(t, 2), testKey(t, 3)
	secret := [SecretSize]byte{1, 2, 3}
	a, err := Wrap(own, other.PublicKey(), secret)
	require.NoError(t, err)
	b, err := Wrap(own, host.PublicKey(), secret)
	require.NoError(t, err)
	slots := append(a[:], b[:]...)
	for _, key := range []*ecdh.PrivateKey{host, other} {
		got, err := Unwrap(key, own.PublicKey(), slots)
		require.NoError(t, err)
		require.Equal(t, secret, got)
	}
	_, err = Unwrap(own, own.PublicKey(), slots)
	require.ErrorIs(t, err, errdefs.ErrNotFound)
	_, err = Unwrap(host, other.PublicKey(), slots)
	require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
	for i := SlotSize + HashSize; i < len(slots); i++ {
		slots[i] ^= 1
		_, err = Unwrap(host, own.PublicKey(), slots)
		require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
		slots[i] ^= 1
	}
	_, err = Unwrap(host, own.PublicKey(), slots[:SlotSize+10])
	require.ErrorIs(t, err, errdefs.ErrNotFound)
}

func TestNewKey(t *testing.T) {
	require.True(t, testKey(t, 1).Equal(testKey(t, 1)))
	require.False(t, testKey(t, 1).Equal(testKey(t, 2)))
	_, err := NewKey(bytes.NewReader(nil))
	require.Error(t, err)
	_, err = NewKey(bytes.NewReader(make([]byte, 1<<20)))
	require.ErrorIs(t, err, errdefs.ErrInternal)
}

func FuzzVerify(f *testing.F) {
	p := newPKI(f).finish()
	v, err := newVerifier(p.files, now)
	require.NoError(f, err)
	f.Add(p.host.cert.Raw)
	f.Add(certPEM(p.host.cert))
	f.Add([]byte("-----BEGIN CERTIFICATE-----\n"))
	key := p.host.cert.PublicKey.(*ecdsa.PublicKey)
	f.Fuzz(func(t *testing.T, b []byte) {
		d, err := v.Verify("x", b)
		if err != nil {
			return
		}
		k, err := key.ECDH()
		require.NoError(t, err)
		require.True(t, k.Equal(d.Key), "only the one document is signed")
	})
}

func FuzzParseCRLs(f *testing.F) {
	p := newPKI(f).finish()
	f.Add(p.list(p.signCRL, p.signing))
	f.Add([]byte{0x30, 0x80})
	f.Fuzz(func(t *testing.T, b []byte) {
		lists, err := parseCRLs("x", b)
		if err != nil {
			return
		}
		require.LessOrEqual(t, len(lists), MaxPerFile)
		for _, l := range lists {
			for _, e := range l.Extensions {
				_ = coversAll(e.Value, certificate{p.host.cert, "x"})
			}
		}
	})
}
