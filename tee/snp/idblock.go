// SPDX-License-Identifier: Apache-2.0

package snp

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/sha512"
	"encoding/binary"
	"fmt"

	"github.com/containerd/errdefs"

	"github.com/cloister-project/cloister/tee/abi"
)

// Identity is an ID block: what its signer says a launch is. 56860, SNP_LAUNCH_FINISH, IDB.
type Identity struct {
	// Digest of the launch. The firmware refuses to finish a launch with another one.
	Digest Digest
	// FamilyID and ImageID are the signer's, free.
	FamilyID, ImageID [16]byte
	// GuestSVN is the guest's security version number.
	GuestSVN uint32
	// Policy of the launch. The firmware refuses another one.
	Policy Policy
}

const idBlockVersion = 1

// Block is the ID block's bytes.
func (i Identity) Block() []byte {
	b := make([]byte, 0, abi.SNPIDBlockSize)
	b = append(b, i.Digest[:]...)
	b = append(b, i.FamilyID[:]...)
	b = append(b, i.ImageID[:]...)
	b = binary.LittleEndian.AppendUint32(b, idBlockVersion)
	b = binary.LittleEndian.AppendUint32(b, i.GuestSVN)
	return binary.LittleEndian.AppendUint64(b, uint64(i.Policy))
}

// Places in the ID authentication information: 56860, SNP_LAUNCH_FINISH, ID_AUTH.
const (
	authIDAlgo          = 0x000
	authAuthorAlgo      = 0x004
	authIDSignature     = 0x040
	authIDKey           = 0x240
	authAuthorSignature = 0x680
	authAuthorKey       = 0x880
)

// Sign returns the ID block and its authentication information. author may be nil; with it the ID key is signed by the
// author key, so that a verifier can trust one author and have changing ID keys.
func (i Identity) Sign(id, author *ecdsa.PrivateKey) (block, auth []byte, err error) {
	block = i.Block()
	auth = make([]byte, abi.SNPIDAuthSize)
	binary.LittleEndian.PutUint32(auth[authIDAlgo:], algoECDSAP384)
	binary.LittleEndian.PutUint32(auth[authAuthorAlgo:], algoECDSAP384)
	public, err := place(auth, id, authIDSignature, authIDKey, block)
	if err != nil {
		return nil, nil, fmt.Errorf("sign the ID block: %w", err)
	}
	if author != nil {
		if _, err := place(auth, author, authAuthorSignature, authAuthorKey, public); err != nil {
			return nil, nil, fmt.Errorf("sign the ID key: %w", err)
		}
	}
	return block, auth, nil
}

// place writes a key and its signature of a message, and returns the key's bytes.
func place(auth []byte, key *ecdsa.PrivateKey, atSignature, atKey int, message []byte) ([]byte, error) {
	signature, err := sign(key, message)
	if err != nil {
		return nil, err
	}
	public, err := publicKey(&key.PublicKey)
	if err != nil {
		return nil, err
	}
	copy(auth[atSignature:], signature)
	copy(auth[atKey:], public)
	return public, nil
}

// Verified is what the CPU's firmware takes from an ID block.
type Verified struct {
	Identity Identity
	// IDKeyDigest, and AuthorKeyDigest where there is one, stand in the report.
	IDKeyDigest     Digest
	AuthorKeyDigest *Digest
}

// VerifyIDBlock checks what Sign made from the bytes alone, as the CPU's firmware does. author reports whether an author key
// is to be there. errdefs.ErrInvalidArgument: a firmware would refuse it.
func VerifyIDBlock(block, auth []byte, author bool) (*Verified, error) {
	wrong := func(reason string) error {
		return fmt.Errorf("ID block: %s: %w", reason, errdefs.ErrInvalidArgument)
	}
	switch {
	case len(block) != abi.SNPIDBlockSize || len(auth) != abi.SNPIDAuthSize:
		return nil, wrong(fmt.Sprintf("%d bytes with %d bytes of authentication, want %d and %d", len(block), len(auth), abi.SNPIDBlockSize,
			abi.SNPIDAuthSize))
	case binary.LittleEndian.Uint32(auth[authIDAlgo:]) != algoECDSAP384:
		return nil, wrong("the ID key's algorithm is not ECDSA P-384 with SHA-384")
	case author && binary.LittleEndian.Uint32(auth[authAuthorAlgo:]) != algoECDSAP384:
		return nil, wrong("the author key's algorithm is not ECDSA P-384 with SHA-384")
	case binary.LittleEndian.Uint32(block[80:]) != idBlockVersion:
		return nil, wrong("not version 1")
	}
	v := &Verified{Identity: Identity{
		GuestSVN: binary.LittleEndian.Uint32(block[84:]),
		Policy:   Policy(binary.LittleEndian.Uint64(block[88:])),
	}}
	copy(v.Identity.Digest[:], block)
	copy(v.Identity.FamilyID[:], block[48:])
	copy(v.Identity.ImageID[:], block[64:])
	idKey := auth[authIDKey : authIDKey+publicKeySize]
	if err := verify(idKey, auth[authIDSignature:authIDKey], block); err != nil {
		return nil, fmt.Errorf("ID key: %w", err)
	}
	v.IDKeyDigest = sha512.Sum384(idKey)
	authorKey := auth[authAuthorKey : authAuthorKey+publicKeySize]
	reserved := [][]byte{auth[8:authIDSignature], auth[authIDKey+publicKeySize : authAuthorSignature], auth[authAuthorKey+publicKeySize:]}
	if author {
		if err := verify(authorKey, auth[authAuthorSignature:authAuthorKey], idKey); err != nil {
			return nil, fmt.Errorf("author key: %w", err)
		}
		d := Digest(sha512.Sum384(authorKey))
		v.AuthorKeyDigest = &d
	} else {
		reserved = append(reserved, auth[authAuthorSignature:authAuthorKey], authorKey)
	}
	if !zero(bytes.Join(reserved, nil)) {
		return nil, wrong("something is in its reserved space")
	}
	return v, nil
}
