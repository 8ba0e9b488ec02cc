// SPDX-License-Identifier: Apache-2.0

package image

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/sha512"
	"crypto/subtle"
	"encoding/binary"
	"hash"
)

// PageSize is the unit of encryption and of all places in an image, in bytes.
const PageSize = 4096

// xtsKeySize is an AES-256-XTS key's: one for the data, one for the tweak.
const xtsKeySize = 64

// xts is AES-256-XTS, IEEE Std 1619, with a tweak of 16 bytes in place of a sector's number.
type xts struct{ data, tweak cipher.Block }

func newXTS(key [xtsKeySize]byte) (*xts, error) {
	data, err := aes.NewCipher(key[:xtsKeySize/2])
	if err != nil {
		return nil, err
	}
	tweak, err := aes.NewCipher(key[xtsKeySize/2:])
	return &xts{data, tweak}, err
}

// crypt encrypts or decrypts a whole number of blocks in place.
func (x *xts) crypt(page []byte, tweak [aes.BlockSize]byte, block func(cipher.Block, []byte)) {
	x.tweak.Encrypt(tweak[:], tweak[:])
	for ; len(page) >= aes.BlockSize; page = page[aes.BlockSize:] {
		b := page[:aes.BlockSize]
		subtle.XORBytes(b, b, tweak[:])
		block(x.data, b)
		subtle.XORBytes(b, b, tweak[:])
		double(&tweak)
	}
}

// double multiplies by x in GF(2^128) as IEEE Std 1619, 5.2, writes it: the first byte is the least significant one.
func double(t *[aes.BlockSize]byte) {
	low, high := binary.LittleEndian.Uint64(t[:8]), binary.LittleEndian.Uint64(t[8:])
	carry := high >> 63
	binary.LittleEndian.PutUint64(t[8:], high<<1|low>>63)
	binary.LittleEndian.PutUint64(t[:8], low<<1^carry*0x87)
}

func encrypt(c cipher.Block, b []byte) { c.Encrypt(b, b) }
func decrypt(c cipher.Block, b []byte) { c.Decrypt(b, b) }

// pageTweak is the tweak of the page at an offset in a component: its prefix, and the offset.
func pageTweak(prefix uint64, offset int) [aes.BlockSize]byte {
	var t [aes.BlockSize]byte
	binary.BigEndian.PutUint64(t[:], prefix)
	binary.BigEndian.PutUint64(t[8:], uint64(offset))
	return t
}

// digests gather what the header says about the components.
type digests struct {
	pld, ald, tld hash.Hash
	pages         uint64
}

func newDigests() *digests {
	return &digests{pld: sha512.New(), ald: sha512.New(), tld: sha512.New()}
}

// add takes a component's pages as they are in the image, which are a whole number.
func (d *digests) add(address uint64, prefix uint64, pages []byte) {
	for off := 0; off < len(pages); off += PageSize {
		d.pld.Write(pages[off : off+PageSize])
		var a [8]byte
		binary.BigEndian.PutUint64(a[:], address+uint64(off))
		d.ald.Write(a[:])
		t := pageTweak(prefix, off)
		d.tld.Write(t[:])
		d.pages++
	}
}

func (d *digests) sums() (pld, ald, tld [DigestSize]byte) {
	return [DigestSize]byte(d.pld.Sum(nil)), [DigestSize]byte(d.ald.Sum(nil)), [DigestSize]byte(d.tld.Sum(nil))
}
