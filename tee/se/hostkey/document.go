// SPDX-License-Identifier: Apache-2.0

package hostkey

import (
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"time"

	"github.com/containerd/errdefs"

	"github.com/cloister-project/cloister/tee/firmware"
)

// Limits.
const (
	// MaxCertificateFile and MaxCRLFile bound files, in bytes; a CA's revocation list can be long.
	MaxCertificateFile = 256 << 10
	MaxCRLFile         = 32 << 20
	// MaxFiles bounds each list of files, MaxPerFile the certificates or lists in one.
	MaxFiles   = 64
	MaxPerFile = 16
)

// Document is a machine's host key document.
type Document struct {
	// Name is the file's.
	Name string
	// Key of the machine, on curve P-521.
	Key *ecdh.PublicKey
	// Hash of the key, by which the machine finds its slot.
	Hash [HashSize]byte
	// Serial is the certificate's serial number in decimal digits; NotAfter is its last moment.
	Serial   string
	NotAfter time.Time
	// Verified reports whether a Verifier accepted the document.
	Verified bool
}

// Warning says what a document that is not verified means; it is empty for one that is.
func (d *Document) Warning() string {
	if d.Verified {
		return ""
	}
	return fmt.Sprintf("%s was NOT VERIFIED: whoever made that file may hold the private key, and can then read everything that is sealed "+
		"for it (host key %s)",
		d.Name, hex.EncodeToString(d.Hash[:]))
}

// Check names what of a proof failed.
type Check string

// Checks.
const (
	CheckFile      Check = "file"       // it cannot be read, or holds something else
	CheckKey       Check = "key"        // kind, curve or strength of a key
	CheckAlgorithm Check = "algorithm"  // how something is signed
	CheckValidity  Check = "validity"   // dates
	CheckSubject   Check = "subject"    // whose key it is
	CheckIssuer    Check = "issuer"     // who signed, by name and key identifier
	CheckSignature Check = "signature"  // it is not signed by who it says
	CheckChain     Check = "chain"      // no way up to a given root
	CheckCRL       Check = "crl"        // no revocation list that counts
	CheckRevoked   Check = "revocation" // it is on a revocation list
)

// VerifyError says which check failed for which file. It is errdefs.ErrInvalidArgument.
type VerifyError struct {
	File  string
	Check Check
	// Detail is what was found, Fix what to do.
	Detail, Fix string
}

// Error returns all of it.
func (e *VerifyError) Error() string {
	s := fmt.Sprintf("%s: %s check failed: %s", e.File, e.Check, e.Detail)
	if e.Fix != "" {
		s += "; " + e.Fix
	}
	return s
}

// Is makes it an errdefs.ErrInvalidArgument.
func (e *VerifyError) Is(target error) bool { return target == errdefs.ErrInvalidArgument }

// certificate is one of a file's.
type certificate struct {
	*x509.Certificate
	file string
}

func (c certificate) fail(check Check, fix, format string, a ...any) error {
	return &VerifyError{File: c.file, Check: check, Detail: fmt.Sprintf(format, a...), Fix: fix}
}

// Blocks of PEM files.
const (
	pemCertificate = "CERTIFICATE"
	pemCRL         = "X509 CRL"
)

// blocks returns the DER of all blocks of a type in a PEM file, or the whole content if it is no PEM file.
func blocks(file string, b []byte, kind string) ([][]byte, error) {
	fail := func(format string, a ...any) ([][]byte, error) {
		return nil, &VerifyError{File: file, Check: CheckFile, Detail: fmt.Sprintf(format, a...)}
	}
	var out [][]byte
	rest := b
	for {
		var block *pem.Block
		block, rest = pem.Decode(rest)
		if block == nil {
			break
		}
		if block.Type != kind {
			return fail("it holds a %q beside or in place of %q", block.Type, kind)
		}
		if len(out) == MaxPerFile {
			return fail("it holds more than %d of %q", MaxPerFile, kind)
		}
		out = append(out, block.Bytes)
	}
	if out == nil {
		return [][]byte{b}, nil
	}
	return out, nil
}

func parseCertificates(file string, b []byte) ([]certificate, error) {
	ders, err := blocks(file, b, pemCertificate)
	if err != nil {
		return nil, err
	}
	var out []certificate
	for _, der := range ders {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, &VerifyError{File: file, Check: CheckFile, Detail: fmt.Sprintf("it is no X.509 certificate in PEM or DER: %v", err)}
		}
		out = append(out, certificate{c, file})
	}
	return out, nil
}

func readFiles(paths []string, max int64, take func(path string, b []byte) error) error {
	if len(paths) > MaxFiles {
		return &VerifyError{File: paths[MaxFiles], Check: CheckFile,
			Detail: fmt.Sprintf("%d files are given, at most %d are accepted", len(paths), MaxFiles)}
	}
	for _, path := range paths {
		b, _, err := firmware.ReadFile(path, max)
		if err != nil {
			return err
		}
		if err := take(path, b); err != nil {
			return err
		}
	}
	return nil
}

// parseDocument reads a file with one certificate and its key, and verifies nothing.
func parseDocument(file string, b []byte) (*Document, certificate, error) {
	if len(b) > MaxCertificateFile {
		return nil, certificate{}, &VerifyError{File: file, Check: CheckFile,
			Detail: fmt.Sprintf("it has more than %d bytes", MaxCertificateFile)}
	}
	certs, err := parseCertificates(file, b)
	if err != nil {
		return nil, certificate{}, err
	}
	if len(certs) != 1 {
		return nil, certificate{}, &VerifyError{File: file, Check: CheckFile,
			Detail: fmt.Sprintf("it holds %d certificates, a host key document is one", len(certs))}
	}
	c := certs[0]
	const fix = "take the host key document of the machine itself"
	pub, ok := c.PublicKey.(*ecdsa.PublicKey)
	if !ok {
		return nil, c, c.fail(CheckKey, fix, "its key is of another kind (%s) than a host key, which is on curve P-521", c.PublicKeyAlgorithm)
	}
	key, err := pub.ECDH()
	if err != nil || key.Curve() != ecdh.P521() {
		return nil, c, c.fail(CheckKey, fix, "its key is on curve %s, a host key is on P-521", pub.Curve.Params().Name)
	}
	hash, err := Hash(key)
	if err != nil {
		return nil, c, err
	}
	return &Document{Name: file, Key: key, Hash: hash, Serial: c.SerialNumber.String(), NotAfter: c.NotAfter}, c, nil
}

// ReadUnverified reads a host key document and believes it. Everything that is sealed for its key can be read by whoever
// holds the private one, be it a machine of IBM's or not: for tests, and for keys that came by a way that is trusted.
// Show Document.Warning.
func ReadUnverified(path string) (*Document, error) {
	b, _, err := firmware.ReadFile(path, MaxCertificateFile)
	if err != nil {
		return nil, err
	}
	d, _, err := parseDocument(path, b)
	return d, err
}
