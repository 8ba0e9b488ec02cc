// SPDX-License-Identifier: Apache-2.0

package hostkey

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/ecdh"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"io"

	"github.com/containerd/errdefs"
)

// Sizes in bytes.
const (
	// CoordinatesSize is that of a P-521 point: X and Y, each padded on the left to 80 bytes.
	CoordinatesSize = 160
	// HashSize is that of a public host key's hash.
	HashSize = sha256.Size
	// SecretSize is that of the key in a slot.
	SecretSize = 32
	// SlotSize is a slot's: hash, wrapped key, tag.
	SlotSize = HashSize + SecretSize + tagSize

	tagSize        = 16
	nonceSize      = 12
	coordinateSize = CoordinatesSize / 2
	scalarSize     = 66 // of P-521
)

// Coordinates is a public key as Secure Execution's structures hold it.
func Coordinates(key *ecdh.PublicKey) ([CoordinatesSize]byte, error) {
	var out [CoordinatesSize]byte
	if key == nil || key.Curve() != ecdh.P521() {
		return out, fmt.Errorf("the key is not on curve P-521: %w", errdefs.ErrInvalidArgument)
	}
	point := key.Bytes()[1:] // after the byte that says "uncompressed"
	copy(out[coordinateSize-scalarSize:], point[:scalarSize])
	copy(out[CoordinatesSize-scalarSize:], point[scalarSize:])
	return out, nil
}

// ParseCoordinates is the reverse of Coordinates. A point that is not on the curve is errdefs.ErrInvalidArgument.
func ParseCoordinates(b []byte) (*ecdh.PublicKey, error) {
	if len(b) != CoordinatesSize {
		return nil, fmt.Errorf("a public key of %d bytes, want %d: %w", len(b), CoordinatesSize, errdefs.ErrInvalidArgument)
	}
	for i := range coordinateSize - scalarSize {
		if b[i]|b[coordinateSize+i] != 0 {
			return nil, fmt.Errorf("a coordinate is larger than P-521 allows: %w", errdefs.ErrInvalidArgument)
		}
	}
	point := append([]byte{4}, b[coordinateSize-scalarSize:coordinateSize]...)
	key, err := ecdh.P521().NewPublicKey(append(point, b[CoordinatesSize-scalarSize:]...))
	if err != nil {
		return nil, fmt.Errorf("a public key is no point of P-521: %w (%w)", err, errdefs.ErrInvalidArgument)
	}
	return key, nil
}

// Hash is the SHA-256 by which a machine names its key, of the key's coordinates.
func Hash(key *ecdh.PublicKey) ([HashSize]byte, error) {
	c, err := Coordinates(key)
	if err != nil {
		return [HashSize]byte{}, err
	}
	return sha256.Sum256(c[:]), nil
}

// NewKey makes a P-521 key of random's bytes. The same bytes give the same key, which ecdh.GenerateKey does not promise.
func NewKey(random io.Reader) (*ecdh.PrivateKey, error) {
	// FIPS 186-5, A.2.2: candidates are drawn until one is in range; half of them are.
	for range 128 {
		var scalar [scalarSize]byte
		if _, err := io.ReadFull(random, scalar[:]); err != nil {
			return nil, err
		}
		scalar[0] &= 1 // the order has 521 bits
		if key, err := ecdh.P521().NewPrivateKey(scalar[:]); err == nil {
			return key, nil
		}
	}
	return nil, fmt.Errorf("the source of randomness gives no key: %w", errdefs.ErrInternal)
}

// Wrap makes the slot by which the owner of host's private key gets secret from the owner of own: the host key's hash,
// and secret under AES-256-GCM with the key that exchange agrees on, a nonce of zeros (that key is used for nothing else), and no
// additional data.
func Wrap(own *ecdh.PrivateKey, host *ecdh.PublicKey, secret [SecretSize]byte) ([SlotSize]byte, error) {
	var slot [SlotSize]byte
	hash, err := Hash(host)
	if err != nil {
		return slot, err
	}
	aead, err := exchange(own, host)
	if err != nil {
		return slot, err
	}
	copy(slot[:], hash[:])
	aead.Seal(slot[:HashSize], make([]byte, nonceSize), secret[:], nil)
	return slot, nil
}

// Unwrap finds the slot of a private host key among slots and opens it; customer is the public key of who made them.
// errdefs.ErrNotFound: there is no slot for the key. errdefs.ErrInvalidArgument: the slot was changed.
func Unwrap(host *ecdh.PrivateKey, customer *ecdh.PublicKey, slots []byte) (secret [SecretSize]byte, err error) {
	hash, err := Hash(host.PublicKey())
	if err != nil {
		return secret, err
	}
	for ; len(slots) >= SlotSize; slots = slots[SlotSize:] {
		if [HashSize]byte(slots) != hash {
			continue
		}
		aead, err := exchange(host, customer)
		if err != nil {
			return secret, err
		}
		if _, err := aead.Open(secret[:0], make([]byte, nonceSize), slots[HashSize:SlotSize], nil); err != nil {
			return secret, fmt.Errorf("the key slot of host key %x does not open: it, or the public key beside it, was changed (%w)", hash,
				errdefs.ErrInvalidArgument)
		}
		return secret, nil
	}
	return secret, fmt.Errorf("there is no key slot for host key %x: %w", hash, errdefs.ErrNotFound)
}

// exchange agrees on a key: SHA-256 of the shared point's X coordinate and the counter 1 (NIST SP 800-56C, one-step
// derivation with a hash and no further information).
func exchange(own *ecdh.PrivateKey, other *ecdh.PublicKey) (cipher.AEAD, error) {
	shared, err := own.ECDH(other)
	if err != nil {
		return nil, fmt.Errorf("agree on a key: %w (%w)", err, errdefs.ErrInvalidArgument)
	}
	key := sha256.Sum256(binary.BigEndian.AppendUint32(shared, 1))
	block, err := aes.NewCipher(key[:])
	if err != nil {
		return nil, err
	}
	return cipher.NewGCM(block)
}
