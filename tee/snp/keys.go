// SPDX-License-Identifier: Apache-2.0

package snp

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/sha512"
	"crypto/x509"
	"encoding/asn1"
	"encoding/binary"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"slices"

	"github.com/containerd/errdefs"

	"github.com/cloister-project/cloister/tee/firmware"
)

const (
	maxKeyFile = 64 << 10

	// Sizes of 56860 chapter 10: a signature and a public key, with their unused space, and a number in them.
	signatureSize = 512
	publicKeySize = 1028
	numberSize    = 72

	curveP384     = 2
	algoECDSAP384 = 1 // ECDSA P-384 with SHA-384
)

// LoadKey reads an ECDSA P-384 private key from a PEM file, PKCS#8 ("PRIVATE KEY") or SEC 1 ("EC PRIVATE KEY"). The file
// must not be open to all users. errdefs.ErrInvalidArgument: it is no such file. Errors never have a part of the content.
func LoadKey(path string) (*ecdsa.PrivateKey, error) {
	raw, err := firmware.ReadKeyFile(path, maxKeyFile)
	if err != nil {
		return nil, err
	}
	key, err := parseKey(raw)
	if err != nil {
		return nil, fmt.Errorf("the key %s: %w", path, err)
	}
	return key, nil
}

func parseKey(raw []byte) (*ecdsa.PrivateKey, error) {
	var keys []*ecdsa.PrivateKey
	for {
		block, rest := pem.Decode(raw)
		if block == nil {
			break
		}
		raw = rest
		switch block.Type {
		case "EC PARAMETERS": // `openssl ecparam -genkey` writes the curve in front
		case "PRIVATE KEY":
			k, err := x509.ParsePKCS8PrivateKey(block.Bytes)
			if err != nil {
				return nil, fmt.Errorf("not readable as PKCS#8: %w", errdefs.ErrInvalidArgument)
			}
			ec, ok := k.(*ecdsa.PrivateKey)
			if !ok {
				return nil, fmt.Errorf("it is no elliptic-curve key, want ECDSA P-384: %w", errdefs.ErrInvalidArgument)
			}
			keys = append(keys, ec)
		case "EC PRIVATE KEY":
			if len(block.Headers) > 0 {
				return nil, fmt.Errorf("it is encrypted; give it in the clear in a file that only root can read: %w", errdefs.ErrInvalidArgument)
			}
			k, err := x509.ParseECPrivateKey(block.Bytes)
			if err != nil {
				return nil, fmt.Errorf("not readable as SEC 1: %w", errdefs.ErrInvalidArgument)
			}
			keys = append(keys, k)
		default:
			return nil, fmt.Errorf("it has a PEM block %.40q, want \"PRIVATE KEY\" or \"EC PRIVATE KEY\": %w", block.Type,
				errdefs.ErrInvalidArgument)
		}
	}
	switch {
	case len(keys) != 1:
		return nil, fmt.Errorf("%d private keys, want one in PEM: %w", len(keys), errdefs.ErrInvalidArgument)
	case keys[0].Curve != elliptic.P384():
		return nil, fmt.Errorf("its curve is %s, want P-384 (openssl ecparam -name secp384r1 -genkey -noout): %w", keys[0].Curve.Params().Name,
			errdefs.ErrInvalidArgument)
	}
	return keys[0], nil
}

// publicKey is a public key as the firmware reads it: le32 curve, X and Y little-endian.
func publicKey(key *ecdsa.PublicKey) ([]byte, error) {
	point, err := key.Bytes() // 4, X, Y
	if err != nil {
		return nil, err
	}
	half := len(point) / 2
	b := make([]byte, publicKeySize)
	binary.LittleEndian.PutUint32(b, curveP384)
	copy(b[4:], reversed(point[1:1+half]))
	copy(b[4+numberSize:], reversed(point[1+half:]))
	return b, nil
}

// KeyDigest is what a report shows of a key: ID_KEY_DIGEST, AUTHOR_KEY_DIGEST.
func KeyDigest(key *ecdsa.PublicKey) (Digest, error) {
	b, err := publicKey(key)
	if err != nil {
		return Digest{}, err
	}
	return sha512.Sum384(b), nil
}

// sign returns a signature as the firmware reads it: r and s little-endian. Without a source of randomness it is
// deterministic, RFC 6979.
func sign(key *ecdsa.PrivateKey, message []byte) ([]byte, error) {
	hash := sha512.Sum384(message)
	r, s, err := signNumbers(key, hash[:])
	if err != nil {
		return nil, err
	}
	b := make([]byte, signatureSize)
	copy(b, reversed(r.FillBytes(make([]byte, numberSize))))
	copy(b[numberSize:], reversed(s.FillBytes(make([]byte, numberSize))))
	return b, nil
}

// verify checks a signature with a public key, both as the firmware reads them. errdefs.ErrInvalidArgument: it is not
// well-formed, or not of this key and message.
func verify(public, signature, message []byte) error {
	wrong := func(reason string) error { return fmt.Errorf("%s: %w", reason, errdefs.ErrInvalidArgument) }
	if len(public) != publicKeySize || len(signature) != signatureSize {
		return wrong("a key or signature of another size")
	}
	if binary.LittleEndian.Uint32(public) != curveP384 {
		return wrong("the key's curve is not P-384")
	}
	number := func(b []byte) []byte { return reversed(b[:numberSize]) }
	const width = 48
	point := []byte{4}
	for _, n := range [][]byte{number(public[4:]), number(public[4+numberSize:])} {
		if !zero(n[:numberSize-width]) {
			return wrong("a coordinate is larger than the curve's")
		}
		point = append(point, n[numberSize-width:]...)
	}
	if !zero(public[4+2*numberSize:]) || !zero(signature[2*numberSize:]) {
		return wrong("something is behind a key or signature")
	}
	key, err := ecdsa.ParseUncompressedPublicKey(elliptic.P384(), point)
	if err != nil {
		return wrong("the key is no point of the curve")
	}
	hash := sha512.Sum384(message)
	r, s := new(big.Int).SetBytes(number(signature)), new(big.Int).SetBytes(number(signature[numberSize:]))
	if !ecdsa.Verify(key, hash[:], r, s) {
		return wrong("the signature does not fit")
	}
	return nil
}

func zero(b []byte) bool {
	return !slices.ContainsFunc(b, func(c byte) bool { return c != 0 })
}

func reversed(b []byte) []byte {
	b = slices.Clone(b)
	slices.Reverse(b)
	return b
}

var errSignature = errors.New("the signature's encoding is not understood")

// signNumbers signs a hash. The standard library gives deterministic signatures in ASN.1 only.
func signNumbers(key *ecdsa.PrivateKey, hash []byte) (r, s *big.Int, err error) {
	der, err := key.Sign(nil, hash, crypto.SHA384)
	if err != nil {
		return nil, nil, err
	}
	var sig struct{ R, S *big.Int }
	if rest, err := asn1.Unmarshal(der, &sig); err != nil || len(rest) > 0 {
		return nil, nil, errSignature
	}
	return sig.R, sig.S, nil
}
