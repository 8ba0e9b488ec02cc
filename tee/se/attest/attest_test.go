// SPDX-License-Identifier: Apache-2.0

package attest

import (
	"bytes"
	"crypto/ecdh"
	"crypto/hmac"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/binary"
	"encoding/hex"
	mathrand "math/rand/v2"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"

	"github.com/cloister-project/cloister/tee/se/hostkey"
	"github.com/cloister-project/cloister/tee/se/image"
)

func newKey(t testing.TB, n byte) *ecdh.PrivateKey {
	t.Helper()
	key, err := hostkey.NewKey(mathrand.NewChaCha8([32]byte{n}))
	require.NoError(t, err)
	return key
}

func testHeader(t testing.TB, keys ...*ecdh.PrivateKey) *image.Header {
	h := &image.Header{}
	for i := range h.PLD {
		h.PLD[i], h.ALD[i], h.TLD[i] = 1, 2, 3
	}
	for i := range h.Tag {
		h.Tag[i] = 4
	}
	for _, key := range keys {
		slot, err := hostkey.Wrap(newKey(t, 100), key.PublicKey(), [hostkey.SecretSize]byte{})
		require.NoError(t, err)
		h.Slots = append(h.Slots, slot[:]...)
	}
	return h
}

// TestMeasureKnownAnswers: the first 16 bytes of the HMACs that IBM publishes for these inputs with its own verifier.
func TestMeasureKnownAnswers(t *testing.T) {
	key := [KeySize]byte(bytes.Repeat([]byte{0x41}, KeySize))
	nonce := [NonceSize]byte(bytes.Repeat([]byte{8}, NonceSize))
	minimal := Measured{Header: testHeader(t), CUID: [CUIDSize]byte(bytes.Repeat([]byte{5}, CUIDSize))}
	full := minimal
	full.User, full.Additional = bytes.Repeat([]byte{7}, 256), bytes.Repeat([]byte{9}, 128)
	for _, tt := range []struct {
		nonce *[NonceSize]byte
		m     Measured
		want  string
	}{
		{nil, minimal, "c5c34c93835d1ec23f5c2d778dfa2012"},
		{nil, full, "fbd4f738a390edd947cd4f11af3a2f3b"},
		{&nonce, full, "88794c62cce7bcf26216deb3f48f13fe"},
	} {
		got := Measure(key, tt.nonce, tt.m)
		require.Equal(t, tt.want, hex.EncodeToString(got[:16]))
	}
}

// machine is a software ultravisor: it has the private host key, and answers as the hardware does, computed here from the
// format's description and not with this package's code.
func machine(t *testing.T, host *ecdh.PrivateKey, header *image.Header, request []byte, user []byte) *Exchange {
	t.Helper()
	point := host.PublicKey().Bytes()
	coordinates := make([]byte, 160)
	copy(coordinates[14:], point[1:67])
	copy(coordinates[94:], point[67:])
	hash := sha256.Sum256(coordinates)

	r, err := ParseRequest(request)
	require.NoError(t, err)
	s, err := r.Open(host)
	require.NoError(t, err)
	flags := binary.BigEndian.Uint64(request[0x30:])
	var add []byte
	for bit, value := range map[int][]byte{2: hash[:], 3: hash[:]} {
		if flags&(1<<(63-bit)) != 0 {
			add = append(add, value...)
		}
	}
	if flags&(1<<(63-4)) != 0 {
		add = append(add, bytes.Repeat([]byte{0x55}, 64)...)
	}
	if flags&(1<<(63-5)) != 0 {
		add = append(add, bytes.Repeat([]byte{0xf0}, 320)...)
	}
	cuid := [CUIDSize]byte{0xc0, 1}
	mac := hmac.New(sha512.New, s.Key[:])
	for _, b := range [][]byte{
		header.PLD[:], header.ALD[:], header.TLD[:], header.Tag[:], cuid[:],
		{byte(len(user) >> 8), byte(len(user)), 0, 0, 0, 0, byte(len(add) >> 8), byte(len(add))},
		user, s.Nonce[:], add,
	} {
		mac.Write(b)
	}
	return &Exchange{Request: request, Measurement: mac.Sum(nil), Additional: add, User: user, CUID: &cuid}
}

func TestRoundTrip(t *testing.T) {
	host, other := newKey(t, 1), newKey(t, 2)
	header := testHeader(t, other, host)
	digest := sha256.Sum256([]byte("initdata"))
	user := UserData(digest[:])
	require.Equal(t, append(digest[:], make([]byte, 32)...), user[:])
	require.Zero(t, UserData(nil))

	for _, flags := range []Flags{0, ImageHostKey, ImageHostKey | AttestHostKey, ImageHostKey | AttestHostKey | SecretStore | Firmware} {
		request, secret, err := NewRequest([]*ecdh.PublicKey{host.PublicKey(), other.PublicKey()}, flags, nil)
		require.NoError(t, err)
		out, err := NewExchange(request, flags).Marshal()
		require.NoError(t, err)
		sent, err := ParseExchange(out)
		require.NoError(t, err)
		require.Equal(t, uint32(MeasurementSize), sent.MeasurementSize)
		require.Equal(t, uint32(flags.AdditionalSize()), sent.AdditionalSize)

		back, err := machine(t, host, header, sent.Request, user[:]).Marshal()
		require.NoError(t, err)
		answer, err := ParseExchange(back)
		require.NoError(t, err)
		e, err := Verify(secret, header, answer)
		require.NoError(t, err)
		require.Equal(t, image.Hex(user[:]), e.User)
		require.Equal(t, flags&ImageHostKey != 0, e.ImageHostKey != nil)
		require.Equal(t, flags&AttestHostKey != 0, e.AttestHostKey != nil)
		require.Equal(t, flags&SecretStore != 0, e.SecretStore != nil)
		require.Equal(t, flags&Firmware != 0, len(e.Firmware) == 320)
	}
}

func TestVerifyRefuses(t *testing.T) {
	host := newKey(t, 1)
	request, secret, err := NewRequest([]*ecdh.PublicKey{host.PublicKey()}, ImageHostKey|AttestHostKey, nil)
	require.NoError(t, err)
	header := testHeader(t, host)
	user := UserData([]byte{1})
	tests := map[string]func(s *Secret, h *image.Header, a *Exchange){
		"PLD":            func(_ *Secret, h *image.Header, _ *Exchange) { h.PLD[5] ^= 1 },
		"ALD":            func(_ *Secret, h *image.Header, _ *Exchange) { h.ALD[5] ^= 1 },
		"TLD":            func(_ *Secret, h *image.Header, _ *Exchange) { h.TLD[5] ^= 1 },
		"tag":            func(_ *Secret, h *image.Header, _ *Exchange) { h.Tag[5] ^= 1 },
		"user data":      func(_ *Secret, _ *image.Header, a *Exchange) { a.User[5] ^= 1 },
		"no user data":   func(_ *Secret, _ *image.Header, a *Exchange) { a.User = nil },
		"configuration":  func(_ *Secret, _ *image.Header, a *Exchange) { a.CUID[5] ^= 1 },
		"no id":          func(_ *Secret, _ *image.Header, a *Exchange) { a.CUID = nil },
		"additional":     func(_ *Secret, _ *image.Header, a *Exchange) { a.Additional[5] ^= 1 },
		"no additional":  func(_ *Secret, _ *image.Header, a *Exchange) { a.Additional = nil },
		"measurement":    func(_ *Secret, _ *image.Header, a *Exchange) { a.Measurement[5] ^= 1 },
		"short":          func(_ *Secret, _ *image.Header, a *Exchange) { a.Measurement = a.Measurement[1:] },
		"another nonce":  func(s *Secret, _ *image.Header, _ *Exchange) { s.Nonce[5] ^= 1 },
		"another key":    func(s *Secret, _ *image.Header, _ *Exchange) { s.Key[5] ^= 1 },
		"image's slot":   func(_ *Secret, h *image.Header, _ *Exchange) { h.Slots = testHeader(t, newKey(t, 2)).Slots },
		"request's slot": func(s *Secret, _ *image.Header, _ *Exchange) { s.HostKeys = nil },
		"asked for more": func(s *Secret, _ *image.Header, _ *Exchange) { s.Flags |= Firmware },
	}
	for name, change := range tests {
		t.Run(name, func(t *testing.T) {
			s, h := *secret, *header
			a := machine(t, host, header, bytes.Clone(request), bytes.Clone(user[:]))
			change(&s, &h, a)
			e, err := Verify(&s, &h, a)
			require.ErrorIs(t, err, errdefs.ErrPermissionDenied)
			require.Nil(t, e)
		})
	}
	_, err = Verify(secret, header, NewExchange(request, secret.Flags))
	require.ErrorContains(t, err, "no answer")
}

// TestRequestFields reads a request by the format's description.
func TestRequestFields(t *testing.T) {
	host := newKey(t, 1)
	make := func() ([]byte, *Secret) {
		b, s, err := NewRequest([]*ecdh.PublicKey{newKey(t, 2).PublicKey(), host.PublicKey()}, ImageHostKey|Firmware,
			mathrand.NewChaCha8([32]byte{7}))
		require.NoError(t, err)
		return b, s
	}
	b, s := make()
	again, _ := make()
	require.Equal(t, b, again)
	require.Len(t, b, 48+8+4+4+160+2*80+80+16)
	require.Equal(t, "00000000000000000000010000000"+"1e0", hex.EncodeToString(b[:16]))
	require.Equal(t, "00000000"+"00000000000000"+"02"+"00000000"+"00000050", hex.EncodeToString(b[0x1c:0x30]))
	require.Equal(t, "6400000000000000"+"00000001"+"00000000", hex.EncodeToString(b[0x30:0x40]))
	hash, err := hostkey.Hash(host.PublicKey())
	require.NoError(t, err)
	require.Equal(t, hash[:], b[0xe0+80:0xe0+112])

	r, err := ParseRequest(b)
	require.NoError(t, err)
	got, err := r.Open(host)
	require.NoError(t, err)
	require.Equal(t, s, got)
	_, err = r.Open(newKey(t, 3))
	require.ErrorIs(t, err, errdefs.ErrNotFound)

	// Every byte counts.
	for i := range b {
		changed := bytes.Clone(b)
		changed[i] ^= 0x80
		r, err := ParseRequest(changed)
		if err == nil {
			_, err = r.Open(host)
		}
		require.Error(t, err, "byte 0x%x", i)
	}
}

func TestNewRequestRefuses(t *testing.T) {
	_, _, err := NewRequest(nil, 0, nil)
	require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
	key := newKey(t, 1).PublicKey()
	_, _, err = NewRequest([]*ecdh.PublicKey{key}, 1, nil)
	require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
	_, _, err = NewRequest([]*ecdh.PublicKey{nil}, 0, nil)
	require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
	_, _, err = NewRequest([]*ecdh.PublicKey{key}, 0, bytes.NewReader(nil))
	require.Error(t, err)
	many := make([]*ecdh.PublicKey, MaxHostKeys+1)
	_, _, err = NewRequest(many, 0, nil)
	require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
}

func TestExchangeRefuses(t *testing.T) {
	good, err := (&Exchange{Request: []byte("request"), Measurement: []byte("m"), User: []byte("user"), CUID: &[CUIDSize]byte{1}}).Marshal()
	require.NoError(t, err)
	_, err = ParseExchange(good)
	require.NoError(t, err)
	require.Equal(t, "7076617474657374"+"00000100"+"0000005c"+"0000000000000000"+"00000007"+"00000040"+"00000001"+"00000047"+
		"0000000000000000"+"00000004"+"00000048"+"00000010"+"0000004c", hex.EncodeToString(good[:0x40]))
	tests := map[string]func(b []byte) []byte{
		"empty":              func([]byte) []byte { return nil },
		"cut":                func(b []byte) []byte { return b[:len(b)-1] },
		"longer":             func(b []byte) []byte { return append(b, 0) },
		"longer, says so":    func(b []byte) []byte { b[15]++; return append(b, 0) },
		"magic":              func(b []byte) []byte { b[0] = 'P'; return b },
		"version":            func(b []byte) []byte { b[11] = 1; return b },
		"reserved":           func(b []byte) []byte { b[20] = 1; return b },
		"request elsewhere":  func(b []byte) []byte { b[31]++; return b },
		"in the header":      func(b []byte) []byte { b[31] = 8; return b },
		"request not there":  func(b []byte) []byte { clear(b[28:32]); return b },
		"no request":         func(b []byte) []byte { clear(b[24:32]); return b },
		"large":              func(b []byte) []byte { b[32] = 0xff; return b },
		"size 0":             func(b []byte) []byte { clear(b[32:36]); return b },
		"short id":           func(b []byte) []byte { b[59] = 15; b[15]--; return b[:len(b)-1] },
		"id only expected":   func(b []byte) []byte { clear(b[60:64]); return b },
		"user data expected": func(b []byte) []byte { clear(b[52:56]); return b },
	}
	for name, change := range tests {
		_, err := ParseExchange(change(bytes.Clone(good)))
		require.ErrorIs(t, err, errdefs.ErrInvalidArgument, name)
	}
	for name, e := range map[string]*Exchange{
		"no request":     {User: []byte{1}},
		"long user data": {Request: []byte{1}, User: make([]byte, MaxUser+1)},
		"large expected": {Request: []byte{1}, AdditionalSize: MaxAdditional + 1},
	} {
		_, err := e.Marshal()
		require.ErrorIs(t, err, errdefs.ErrInvalidArgument, name)
	}
}

func FuzzParseExchange(f *testing.F) {
	request, _, err := NewRequest([]*ecdh.PublicKey{newKey(f, 1).PublicKey()}, ImageHostKey, nil)
	require.NoError(f, err)
	for _, e := range []*Exchange{
		NewExchange(request, ImageHostKey),
		{Request: request, Measurement: make([]byte, MeasurementSize), Additional: make([]byte, 32), User: make([]byte, UserDataSize),
			CUID: &[CUIDSize]byte{}},
	} {
		b, err := e.Marshal()
		require.NoError(f, err)
		f.Add(b)
	}
	secret := &Secret{}
	f.Fuzz(func(t *testing.T, b []byte) {
		e, err := ParseExchange(b)
		if err != nil {
			return
		}
		again, err := e.Marshal()
		require.NoError(t, err)
		require.Equal(t, b, again)
		_, err = Verify(secret, &image.Header{}, e)
		require.Error(t, err)
	})
}

func FuzzParseRequest(f *testing.F) {
	// The workers of a run must know the same request.
	host := newKey(f, 1)
	b, want, err := NewRequest([]*ecdh.PublicKey{host.PublicKey()}, ImageHostKey, mathrand.NewChaCha8([32]byte{7}))
	require.NoError(f, err)
	f.Add(b)
	f.Add(b[:fixedSize])
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := ParseRequest(b)
		if err != nil {
			return
		}
		if got, err := r.Open(host); err == nil {
			require.Equal(t, want, got, "only one request is sealed")
		}
	})
}
