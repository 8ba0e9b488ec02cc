// SPDX-License-Identifier: Apache-2.0

package attest

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/ecdh"
	"crypto/rand"
	"encoding/binary"
	"fmt"
	"io"

	"github.com/containerd/errdefs"

	"github.com/cloister-project/cloister/tee/se/hostkey"
)

// Sizes in bytes.
const (
	// KeySize is the measurement key's, NonceSize the nonce's, MeasurementSize the answer's.
	KeySize         = 64
	NonceSize       = 16
	MeasurementSize = 64
	// CUIDSize is a configuration's unique id's.
	CUIDSize = 16

	requestVersion = 0x100
	algorithmHMAC  = 1 // HMAC-SHA-512
	ivSize         = 12
	tagSize        = 16
	offSlots       = 0xe0
	sealedSize     = KeySize + NonceSize
	fixedSize      = offSlots + sealedSize + tagSize
	// MaxHostKeys is how many key slots a request can have: their number is one byte.
	MaxHostKeys = 255
)

// Flags say what a request asks for; bits count from the most significant one.
type Flags uint64

// Flags of requests. A nonce is always used.
const (
	nonceFlag Flags = 1 << (63 - 1)
	// ImageHostKey asks for the hash of the host key that opened the image.
	ImageHostKey Flags = 1 << (63 - 2)
	// AttestHostKey asks for the hash of the host key that opened the request.
	AttestHostKey Flags = 1 << (63 - 3)
	// SecretStore asks for a hash of the secrets that were added to the guest.
	SecretStore Flags = 1 << (63 - 4)
	// Firmware asks for a hash of the machine's firmware, which IBM's service can interpret.
	Firmware Flags = 1 << (63 - 5)

	knownFlags = nonceFlag | ImageHostKey | AttestHostKey | SecretStore | Firmware
)

// additional lists what flags ask for, in the order of the answer, with their sizes in bytes.
var additional = []struct {
	flag Flags
	size int
}{{ImageHostKey, hostkey.HashSize}, {AttestHostKey, hostkey.HashSize}, {SecretStore, 64}, {Firmware, 320}}

// AdditionalSize is the length of what flags ask for, in bytes.
func (f Flags) AdditionalSize() int {
	n := 0
	for _, a := range additional {
		if f&a.flag != 0 {
			n += a.size
		}
	}
	return n
}

// Secret is what the verifier keeps of a request until the answer. Whoever has it can forge one.
type Secret struct {
	// Key of the measurement.
	Key [KeySize]byte
	// Nonce of the request.
	Nonce [NonceSize]byte
	// Flags that were asked for.
	Flags Flags
	// HostKeys are the hashes of the host keys that can open the request.
	HostKeys [][hostkey.HashSize]byte
}

// Request is the part of a request that everybody can read.
type Request struct {
	IV    [ivSize]byte
	Flags Flags
	// Customer is the verifier's public key, made for this request.
	Customer *ecdh.PublicKey
	// Slots of the machines that can answer, hostkey.SlotSize bytes each.
	Slots []byte

	authenticated, sealed []byte
}

// NewRequest makes a request that the machines of keys can answer, and what its answer is checked with. random nil is
// crypto/rand.
func NewRequest(keys []*ecdh.PublicKey, flags Flags, random io.Reader) ([]byte, *Secret, error) {
	if len(keys) == 0 || len(keys) > MaxHostKeys {
		return nil, nil, fmt.Errorf("%d host keys, want 1 to %d: %w", len(keys), MaxHostKeys, errdefs.ErrInvalidArgument)
	}
	if unknown := flags &^ knownFlags; unknown != 0 {
		return nil, nil, fmt.Errorf("unknown flags 0x%016x: %w", uint64(unknown), errdefs.ErrInvalidArgument)
	}
	if random == nil {
		random = rand.Reader
	}
	s := &Secret{Flags: flags | nonceFlag}
	var requestKey [hostkey.SecretSize]byte
	var iv [ivSize]byte
	for _, to := range [][]byte{requestKey[:], iv[:], s.Key[:], s.Nonce[:]} {
		if _, err := io.ReadFull(random, to); err != nil {
			return nil, nil, err
		}
	}
	own, err := hostkey.NewKey(random)
	if err != nil {
		return nil, nil, err
	}
	customer, err := hostkey.Coordinates(own.PublicKey())
	if err != nil {
		return nil, nil, err
	}
	b := make([]byte, 8) // no magic
	b = binary.BigEndian.AppendUint32(b, requestVersion)
	b = binary.BigEndian.AppendUint32(b, uint32(fixedSize+len(keys)*hostkey.SlotSize))
	b = append(b, iv[:]...)
	b = append(b, make([]byte, 11)...)
	b = append(b, byte(len(keys)), 0, 0, 0, 0)
	b = binary.BigEndian.AppendUint32(b, sealedSize)
	b = binary.BigEndian.AppendUint64(b, uint64(s.Flags))
	b = binary.BigEndian.AppendUint32(b, algorithmHMAC)
	b = append(b, 0, 0, 0, 0)
	b = append(b, customer[:]...)
	for _, key := range keys {
		slot, err := hostkey.Wrap(own, key, requestKey)
		if err != nil {
			return nil, nil, err
		}
		b = append(b, slot[:]...)
		s.HostKeys = append(s.HostKeys, [hostkey.HashSize]byte(slot[:]))
	}
	aead, err := newGCM(requestKey)
	if err != nil {
		return nil, nil, err
	}
	return append(b, aead.Seal(nil, iv[:], append(s.Key[:len(s.Key):len(s.Key)], s.Nonce[:]...), b)...), s, nil
}

// ParseRequest reads a request. Faults are errdefs.ErrInvalidArgument.
func ParseRequest(b []byte) (*Request, error) {
	fault := func(format string, a ...any) (*Request, error) {
		return nil, fmt.Errorf("attestation request: %s: %w", fmt.Sprintf(format, a...), errdefs.ErrInvalidArgument)
	}
	if len(b) < fixedSize {
		return fault("%d bytes are less than the shortest has", len(b))
	}
	nks := int(b[0x27])
	flags := Flags(binary.BigEndian.Uint64(b[0x30:]))
	switch {
	case binary.BigEndian.Uint64(b) != 0:
		return fault("it does not start with zeros")
	case binary.BigEndian.Uint32(b[8:]) != requestVersion:
		return fault("version 0x%x, want 0x%x", binary.BigEndian.Uint32(b[8:]), requestVersion)
	case nks == 0:
		return fault("no key slot")
	case len(b) != fixedSize+nks*hostkey.SlotSize || binary.BigEndian.Uint32(b[12:]) != uint32(len(b)):
		return fault("its %d bytes (%d by its own word) do not go with %d key slots", len(b), binary.BigEndian.Uint32(b[12:]), nks)
	case binary.BigEndian.Uint32(b[0x2c:]) != sealedSize:
		return fault("an encrypted part of %d bytes, want %d: only requests with a nonce are known", binary.BigEndian.Uint32(b[0x2c:]),
			sealedSize)
	case flags&nonceFlag == 0 || flags&^knownFlags != 0:
		return fault("flags 0x%016x", uint64(flags))
	case binary.BigEndian.Uint32(b[0x38:]) != algorithmHMAC:
		return fault("measurement algorithm %d, want %d (HMAC-SHA-512)", binary.BigEndian.Uint32(b[0x38:]), algorithmHMAC)
	}
	customer, err := hostkey.ParseCoordinates(b[0x40:offSlots])
	if err != nil {
		return fault("%v", err)
	}
	end := len(b) - sealedSize - tagSize
	return &Request{
		IV: [ivSize]byte(b[0x10:]), Flags: flags, Customer: customer, Slots: b[offSlots:end],
		authenticated: b[:end], sealed: b[end:],
	}, nil
}

// Open is the machine's part: it unwraps a slot with the private host key and decrypts. errdefs.ErrNotFound: there is no
// slot for the key.
func (r *Request) Open(host *ecdh.PrivateKey) (*Secret, error) {
	key, err := hostkey.Unwrap(host, r.Customer, r.Slots)
	if err != nil {
		return nil, err
	}
	aead, err := newGCM(key)
	if err != nil {
		return nil, err
	}
	plain, err := aead.Open(nil, r.IV[:], r.sealed, r.authenticated)
	if err != nil {
		return nil, fmt.Errorf("the attestation request's tag is not right: it was changed (%w)", errdefs.ErrInvalidArgument)
	}
	s := &Secret{Key: [KeySize]byte(plain), Nonce: [NonceSize]byte(plain[KeySize:]), Flags: r.Flags}
	for slots := r.Slots; len(slots) >= hostkey.SlotSize; slots = slots[hostkey.SlotSize:] {
		s.HostKeys = append(s.HostKeys, [hostkey.HashSize]byte(slots))
	}
	return s, nil
}

func newGCM(key [hostkey.SecretSize]byte) (cipher.AEAD, error) {
	block, err := aes.NewCipher(key[:])
	if err != nil {
		return nil, err
	}
	return cipher.NewGCM(block)
}
