// SPDX-License-Identifier: Apache-2.0

package image

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/ecdh"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/binary"
	"encoding/hex"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// TestFields computes an image's parts anew, from the layout's description alone and without this package's code.
func TestFields(t *testing.T) {
	src := testSources()
	host := newHost(t, 1)
	b := testImage(t, func(c *BuildConfig) { c.Options.CCK = bytes.Repeat([]byte{0xcc}, 32) }).Bytes()
	u32 := func(at int) int { return int(binary.BigEndian.Uint32(b[at:])) }
	u64 := func(at int) int { return int(binary.BigEndian.Uint64(b[at:])) }

	require.Equal(t, 0x0008000180011000, u64(0))
	require.Equal(t, "SeImgLnx", string(b[0xc000:0xc008]))
	header, ipib := u64(0xc008), u64(0xc014)
	require.Equal(t, 1, u32(0xc010))
	require.Equal(t, 0x14000, header)

	// stage3a and its arguments, relative to where they stand.
	args := 0x10000 + len(src.Stage3a) - 24
	require.Equal(t, src.Stage3a[:len(src.Stage3a)-24], b[0x10000:args])
	require.Equal(t, header-args, u64(args))
	require.Equal(t, 560+2*80, u64(args+8))
	require.Equal(t, ipib-args, u64(args+16))

	// The header in clear.
	h := b[header:]
	require.Equal(t, "IBMSecEx", string(h[:8]))
	require.Equal(t, 0x100, u32(header+8))
	require.Equal(t, 560+2*80, u32(header+0xc))
	require.Equal(t, 2, u64(header+0x20))
	require.Equal(t, 128, u64(header+0x28))
	require.Equal(t, 0xe0, u64(header+0x38))

	// The key slot of host 1.
	curve := ecdh.P521()
	x, y := h[0x40:0x90], h[0x90:0xe0]
	require.Zero(t, bytes.Trim(x[:14], "\x00"))
	customer, err := curve.NewPublicKey(append(append([]byte{4}, x[14:]...), y[14:]...))
	require.NoError(t, err)
	point := host.PublicKey().Bytes()
	coordinates := make([]byte, 160)
	copy(coordinates[14:], point[1:67])
	copy(coordinates[94:], point[67:])
	hash := sha256.Sum256(coordinates)
	require.Equal(t, hash[:], h[0x1a0:0x1c0])
	z, err := host.ECDH(customer)
	require.NoError(t, err)
	require.Len(t, z, 66)
	kek := sha256.Sum256(append(z, 0, 0, 0, 1))
	headerKey, err := testGCM(t, kek[:]).Open(nil, make([]byte, 12), h[0x1c0:0x1f0], nil)
	require.NoError(t, err)

	// The secrets.
	aad := h[:0x1a0+2*80]
	secret, err := testGCM(t, headerKey).Open(nil, h[0x10:0x1c], h[len(aad):len(aad)+128+16], aad)
	require.NoError(t, err)
	require.Equal(t, bytes.Repeat([]byte{0xcc}, 32), secret[:32])
	require.Equal(t, uint64(0x180000000), binary.BigEndian.Uint64(secret[96:]))
	start := int(binary.BigEndian.Uint64(secret[104:]))
	require.Zero(t, bytes.Trim(secret[112:], "\x00"), "no secret flags, no optional items")

	// The IPIB and the components that it lists.
	require.Equal(t, 136+4*24, u32(ipib))
	require.Equal(t, 128+4*24, u32(ipib+8))
	require.Equal(t, []byte{1, 5, 1}, []byte{b[ipib+7], b[ipib+12], b[ipib+111]})
	require.Equal(t, 4, u32(ipib+116))
	require.Equal(t, header, u64(ipib+120))
	require.Equal(t, 720, u64(ipib+128))
	require.Equal(t, len(b), ipib+136+4*24)
	pld, ald, tld := sha512.New(), sha512.New(), sha512.New()
	var plain [][]byte
	pages := 0
	for i := range 4 {
		e := ipib + 136 + i*24
		address, size := u64(e+8), u64(e+16)
		require.Equal(t, []byte{0, []byte{40, 50, 60, 70}[i]}, b[e:e+2])
		if i == 0 {
			require.Equal(t, 0x15000, address)
		}
		var component []byte
		for off := 0; off < size; off += 4096 {
			page := b[address+off : address+off+4096]
			tweak := append(bytes.Clone(b[e:e+8]), binary.BigEndian.AppendUint64(nil, uint64(off))...)
			pld.Write(page)
			ald.Write(binary.BigEndian.AppendUint64(nil, uint64(address+off)))
			tld.Write(tweak)
			component = append(component, testXTS(t, secret[32:96], tweak, page)...)
			pages++
		}
		plain = append(plain, component)
		if i == 3 {
			require.Equal(t, start, address)
		}
	}
	require.Equal(t, pages, u64(header+0x30))
	require.Equal(t, pld.Sum(nil), h[0xe0:0x120])
	require.Equal(t, ald.Sum(nil), h[0x120:0x160])
	require.Equal(t, tld.Sum(nil), h[0x160:0x1a0])

	// What is in them.
	for i, want := range [][]byte{src.Kernel, src.Initrd} {
		require.Equal(t, want, plain[i][:len(want)])
		require.Zero(t, bytes.Trim(plain[i][len(want):], "\x00"))
	}
	line, rest, _ := bytes.Cut(plain[2], []byte{0})
	require.True(t, strings.HasPrefix(string(line), "console=ttyS0 panic=-1 cloister.tee=se cloister.initdata="))
	require.Zero(t, bytes.Trim(rest, "\x00"))
	told := plain[3][len(src.Stage3b)-64 : len(src.Stage3b)]
	var want []byte
	for _, v := range []int{u64(ipib + 144), len(src.Kernel), u64(ipib + 192), len(line) + 1, u64(ipib + 168), len(src.Initrd), 0x180000000,
		0x10000} {
		want = binary.BigEndian.AppendUint64(want, uint64(v))
	}
	require.Equal(t, want, told)
}

func testGCM(t *testing.T, key []byte) cipher.AEAD {
	block, err := aes.NewCipher(key)
	require.NoError(t, err)
	aead, err := cipher.NewGCM(block)
	require.NoError(t, err)
	return aead
}

// testXTS decrypts as IEEE Std 1619 writes it, bit by bit.
func testXTS(t *testing.T, key, tweak, data []byte) []byte {
	k1, err := aes.NewCipher(key[:32])
	require.NoError(t, err)
	k2, err := aes.NewCipher(key[32:])
	require.NoError(t, err)
	mask := make([]byte, 16)
	k2.Encrypt(mask, tweak)
	out := bytes.Clone(data)
	for b := out; len(b) > 0; b = b[16:] {
		for i := range mask {
			b[i] ^= mask[i]
		}
		k1.Decrypt(b[:16], b[:16])
		for i := range mask {
			b[i] ^= mask[i]
		}
		var carry byte
		for i := range mask {
			mask[i], carry = mask[i]<<1|carry, mask[i]>>7
		}
		if carry == 1 {
			mask[0] ^= 0x87
		}
	}
	return out
}

// TestXTSVector is test vector 10 of IEEE Std 1619-2007, annex B: AES-256, data unit 0xff.
func TestXTSVector(t *testing.T) {
	key, err := hex.DecodeString("2718281828459045235360287471352662497757247093699959574966967627" +
		"3141592653589793238462643383279502884197169399375105820974944592")
	require.NoError(t, err)
	page := make([]byte, 512)
	for i := range page {
		page[i] = byte(i)
	}
	x, err := newXTS([xtsKeySize]byte(key))
	require.NoError(t, err)
	// The standard's data unit number is little-endian.
	x.crypt(page, [16]byte{0xff}, encrypt)
	require.Equal(t, "1c3b3a102f770386e4836c99e370cf9bea00803f5e482357a4ae12d414a3e63b", hex.EncodeToString(page[:32]))
	x.crypt(page, [16]byte{0xff}, decrypt)
	require.Equal(t, []byte{0, 1, 2, 3}, page[:4])
	require.Equal(t, byte(0xff), page[511])
}
