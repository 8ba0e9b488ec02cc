// SPDX-License-Identifier: Apache-2.0

package image

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/sha512"
	"encoding/binary"
	"fmt"

	"github.com/containerd/errdefs"

	"github.com/cloister-project/cloister/tee/se/hostkey"
)

// Sizes of the header and its fields in bytes, and offsets of its fields.
const (
	DigestSize = sha512.Size
	TagSize    = 16

	headerMagic   = "IBMSecEx"
	headerVersion = 0x100

	offSize      = 0x0c
	offIV        = 0x10
	offReserved  = 0x1c
	offSlots     = 0x20
	offEncrypted = 0x28
	offPages     = 0x30
	offPCF       = 0x38
	offCustomer  = 0x40
	offPLD       = 0xe0
	offALD       = 0x120
	offTLD       = 0x160
	offKeySlots  = 0x1a0

	ivSize        = 12
	secretsSize   = 128
	fixedSize     = offKeySlots + secretsSize + TagSize
	maxHeaderSize = 2 * PageSize
	// MaxHostKeys is how many key slots a header has room for.
	MaxHostKeys = (maxHeaderSize - fixedSize) / hostkey.SlotSize
)

// Header is the part of a Secure Execution header that everybody can read.
type Header struct {
	// IV of the header's own encryption.
	IV [ivSize]byte
	// Pages is the number of encrypted pages.
	Pages uint64
	// PCF are the plaintext control flags.
	PCF PCF
	// Customer is the public key of whoever built the image, made for this image, as hostkey.Coordinates gives it.
	Customer [hostkey.CoordinatesSize]byte
	// PLD, ALD and TLD are SHA-512 digests of the encrypted pages, their addresses and their tweaks.
	PLD, ALD, TLD [DigestSize]byte
	// Slots of the machines that may run the image, hostkey.SlotSize bytes each.
	Slots []byte
	// Encrypted are the image's secrets under AES-256-GCM.
	Encrypted [secretsSize]byte
	// Tag authenticates all of the above.
	Tag [TagSize]byte
}

// HostKeyHashes are the hashes of the host keys that have a slot.
func (h *Header) HostKeyHashes() [][hostkey.HashSize]byte {
	var out [][hostkey.HashSize]byte
	for s := h.Slots; len(s) >= hostkey.SlotSize; s = s[hostkey.SlotSize:] {
		out = append(out, [hostkey.HashSize]byte(s))
	}
	return out
}

// authenticated returns the bytes before the encrypted part.
func (h *Header) authenticated() []byte {
	nks := len(h.Slots) / hostkey.SlotSize
	b := make([]byte, offKeySlots, fixedSize+len(h.Slots))
	copy(b, headerMagic)
	binary.BigEndian.PutUint32(b[len(headerMagic):], headerVersion)
	binary.BigEndian.PutUint32(b[offSize:], uint32(fixedSize+len(h.Slots)))
	copy(b[offIV:], h.IV[:])
	binary.BigEndian.PutUint64(b[offSlots:], uint64(nks))
	binary.BigEndian.PutUint64(b[offEncrypted:], secretsSize)
	binary.BigEndian.PutUint64(b[offPages:], h.Pages)
	binary.BigEndian.PutUint64(b[offPCF:], uint64(h.PCF))
	copy(b[offCustomer:], h.Customer[:])
	copy(b[offPLD:], h.PLD[:])
	copy(b[offALD:], h.ALD[:])
	copy(b[offTLD:], h.TLD[:])
	return append(b, h.Slots...)
}

// Marshal returns the header as it is in an image.
func (h *Header) Marshal() []byte {
	return append(append(h.authenticated(), h.Encrypted[:]...), h.Tag[:]...)
}

// ParseHeader reads a header at the start of b; size is its length. Only version 1 without optional items is known.
func ParseHeader(b []byte) (h *Header, size int, err error) {
	fault := func(format string, a ...any) (*Header, int, error) {
		return nil, 0, fmt.Errorf("header: %s: %w", fmt.Sprintf(format, a...), errdefs.ErrInvalidArgument)
	}
	if len(b) < fixedSize {
		return fault("%d bytes are less than the shortest has", len(b))
	}
	if string(b[:len(headerMagic)]) != headerMagic {
		return fault("it does not start with %q", headerMagic)
	}
	if v := binary.BigEndian.Uint32(b[len(headerMagic):]); v != headerVersion {
		return fault("version 0x%x, want 0x%x", v, headerVersion)
	}
	nks := binary.BigEndian.Uint64(b[offSlots:])
	sea := binary.BigEndian.Uint64(b[offEncrypted:])
	declared := binary.BigEndian.Uint32(b[offSize:])
	switch {
	case nks == 0 || nks > MaxHostKeys:
		return fault("%d key slots, want 1 to %d", nks, MaxHostKeys)
	case sea != secretsSize:
		return fault("an encrypted part of %d bytes, want %d (optional items are not supported)", sea, secretsSize)
	case uint64(declared) != fixedSize+nks*hostkey.SlotSize:
		return fault("a size of %d bytes does not go with %d key slots", declared, nks)
	case uint64(len(b)) < uint64(declared):
		return fault("it is cut off after %d of %d bytes", len(b), declared)
	case binary.BigEndian.Uint32(b[offReserved:]) != 0:
		return fault("reserved bytes are set")
	}
	b = b[:declared]
	h = &Header{
		IV:       [ivSize]byte(b[offIV:]),
		Pages:    binary.BigEndian.Uint64(b[offPages:]),
		PCF:      PCF(binary.BigEndian.Uint64(b[offPCF:])),
		Customer: [hostkey.CoordinatesSize]byte(b[offCustomer:]),
		PLD:      [DigestSize]byte(b[offPLD:]),
		ALD:      [DigestSize]byte(b[offALD:]),
		TLD:      [DigestSize]byte(b[offTLD:]),
		Slots:    bytes.Clone(b[offKeySlots : offKeySlots+int(nks)*hostkey.SlotSize]),
	}
	rest := b[offKeySlots+len(h.Slots):]
	h.Encrypted = [secretsSize]byte(rest)
	h.Tag = [TagSize]byte(rest[secretsSize:])
	return h, len(b), nil
}

// secrets are what the encrypted part of a header holds.
type secrets struct {
	cck   [CCKSize]byte
	xts   [xtsKeySize]byte
	start psw
	scf   SCF
}

func (s *secrets) marshal() []byte {
	b := append(append([]byte(nil), s.cck[:]...), s.xts[:]...)
	b = binary.BigEndian.AppendUint64(b, s.start.mask)
	b = binary.BigEndian.AppendUint64(b, s.start.address)
	b = binary.BigEndian.AppendUint64(b, uint64(s.scf))
	return append(b, make([]byte, secretsSize-len(b))...) // no optional items, reserved
}

func parseSecrets(b []byte) (*secrets, error) {
	s := &secrets{cck: [CCKSize]byte(b), xts: [xtsKeySize]byte(b[CCKSize:])}
	rest := b[CCKSize+xtsKeySize:]
	s.start = psw{binary.BigEndian.Uint64(rest), binary.BigEndian.Uint64(rest[8:])}
	s.scf = SCF(binary.BigEndian.Uint64(rest[16:]))
	if binary.BigEndian.Uint32(rest[24:]) != 0 {
		return nil, fmt.Errorf("the header has optional items, which are not supported: %w", errdefs.ErrNotImplemented)
	}
	return s, nil
}

// seal encrypts the secrets into the header and sets its tag; every other field is set already.
func (h *Header) seal(key [hostkey.SecretSize]byte, s *secrets) error {
	aead, err := newGCM(key)
	if err != nil {
		return err
	}
	sealed := aead.Seal(nil, h.IV[:], s.marshal(), h.authenticated())
	h.Encrypted = [secretsSize]byte(sealed)
	h.Tag = [TagSize]byte(sealed[secretsSize:])
	return nil
}

// open checks the tag and decrypts the secrets.
func (h *Header) open(key [hostkey.SecretSize]byte) (*secrets, error) {
	aead, err := newGCM(key)
	if err != nil {
		return nil, err
	}
	plain, err := aead.Open(nil, h.IV[:], append(h.Encrypted[:], h.Tag[:]...), h.authenticated())
	if err != nil {
		return nil, fmt.Errorf("the header's tag is not right: the header was changed (%w)", errdefs.ErrInvalidArgument)
	}
	return parseSecrets(plain)
}

func newGCM(key [hostkey.SecretSize]byte) (cipher.AEAD, error) {
	block, err := aes.NewCipher(key[:])
	if err != nil {
		return nil, err
	}
	return cipher.NewGCM(block)
}
