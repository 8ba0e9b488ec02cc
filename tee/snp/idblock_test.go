// SPDX-License-Identifier: Apache-2.0

package snp

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/pem"
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
)

// fixedKey is a key with a small private number, the same each time.
func fixedKey(t *testing.T, number byte) *ecdsa.PrivateKey {
	t.Helper()
	raw := make([]byte, 48)
	raw[47] = number
	key, err := ecdsa.ParseRawPrivateKey(elliptic.P384(), raw)
	require.NoError(t, err)
	return key
}

func testIdentity() Identity {
	i := Identity{GuestSVN: 0x01020304, Policy: DefaultPolicy}
	for n := range i.Digest {
		i.Digest[n] = byte(n)
	}
	copy(i.FamilyID[:], "a family of VMs.")
	copy(i.ImageID[:], "an image of them")
	return i
}

func TestIDBlockBytes(t *testing.T) {
	require.Equal(t, "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f202122232425262728292a2b2c2d2e2f"+
		hex.EncodeToString([]byte("a family of VMs."))+hex.EncodeToString([]byte("an image of them"))+
		"01000000"+"04030201"+"0000030000000000", hex.EncodeToString(testIdentity().Block()))
}

// TestIDAuthBytes: with the private number 1 the public key is the curve's base point (FIPS 186-4, D.1.2.4).
func TestIDAuthBytes(t *testing.T) {
	block, auth, err := testIdentity().Sign(fixedKey(t, 1), nil)
	require.NoError(t, err)
	require.Len(t, block, 96)
	require.Len(t, auth, 4096)
	const half = "000000000000000000000000000000000000000000000000"
	require.Equal(t, "0100000001000000", hex.EncodeToString(auth[:8]))
	require.Equal(t, "02000000"+
		hex.EncodeToString(reversed(elliptic.P384().Params().Gx.FillBytes(make([]byte, 48))))+half+
		hex.EncodeToString(reversed(elliptic.P384().Params().Gy.FillBytes(make([]byte, 48))))+half, hex.EncodeToString(auth[0x240:0x240+148]))
	require.Equal(t, "73a93281427cce8571be72e1d03b15a9ef46ecd647e2f4276079fe9a75ec6cd43424ba782f837c60d25b98baa2e4ea0f"+half+
		"742be4d20294aaec7ff785423cb587a7f678e15f66016666b188da9117e0d67de30805ea2c636b87ae5c3d884ebfa2b0"+half,
		hex.EncodeToString(auth[0x40:0x40+144]))
	_, again, err := testIdentity().Sign(fixedKey(t, 1), nil)
	require.NoError(t, err)
	require.Equal(t, auth, again)
}

// TestSignaturesAreDeterministic: RFC 6979, A.2.6, P-384 with SHA-384 and the message "sample".
func TestSignaturesAreDeterministic(t *testing.T) {
	number, err := hex.DecodeString("6b9d3dad2e1b8c1c05b19875b6659f4de23c3b667bf297ba9aa47740787137d896d5724e4c70a825f872c9ea60d2edf5")
	require.NoError(t, err)
	key, err := ecdsa.ParseRawPrivateKey(elliptic.P384(), number)
	require.NoError(t, err)
	signature, err := sign(key, []byte("sample"))
	require.NoError(t, err)
	require.Equal(t, "94edbb92a5ecb8aad4736e56c691916b3f88140666ce9fa73d64c4ea95ad133c81a648152e44acf96e36dd1e80fabe46",
		hex.EncodeToString(reversed(signature[:48])))
	require.Equal(t, "99ef4aeb15f178cea1fe40db2603138f130e740a19624526203b6351d0a3a94fa329c145786e679e7b82c71a38628ac8",
		hex.EncodeToString(reversed(signature[72:120])))
}

func TestSignedIDBlocksVerify(t *testing.T) {
	for name, author := range map[string]*ecdsa.PrivateKey{"without author": nil, "with author": fixedKey(t, 3)} {
		t.Run(name, func(t *testing.T) {
			id := fixedKey(t, 2)
			block, auth, err := testIdentity().Sign(id, author)
			require.NoError(t, err)
			v, err := VerifyIDBlock(block, auth, author != nil)
			require.NoError(t, err)
			require.Equal(t, testIdentity(), v.Identity)
			want, err := KeyDigest(&id.PublicKey)
			require.NoError(t, err)
			require.Equal(t, want, v.IDKeyDigest)
			if author == nil {
				require.Nil(t, v.AuthorKeyDigest)
			} else {
				want, err := KeyDigest(&author.PublicKey)
				require.NoError(t, err)
				require.Equal(t, want, *v.AuthorKeyDigest)
			}
			_, err = VerifyIDBlock(block, auth, author == nil)
			require.ErrorIs(t, err, errdefs.ErrInvalidArgument, "an author key that is there and not asked for, or the other way round")
		})
	}
}

func TestEachByteOfAnIDBlockIsSigned(t *testing.T) {
	block, auth, err := testIdentity().Sign(fixedKey(t, 2), fixedKey(t, 3))
	require.NoError(t, err)
	refused := func(of []byte, at int) {
		t.Helper()
		of[at] ^= 1
		_, err := VerifyIDBlock(block, auth, true)
		require.ErrorIs(t, err, errdefs.ErrInvalidArgument, "byte %#x", at)
		of[at] ^= 1
	}
	for at := range block {
		refused(block, at)
	}
	for _, at := range []int{0, 4, 8, 0x3f, 0x40, 0x6f, 0x70, 0x88, 0xd0, 0x23f, 0x240, 0x244, 0x273, 0x274, 0x28c, 0x2d4, 0x643, 0x644, 0x67f,
		0x680, 0x6c8, 0x710,
		0x87f, 0x880, 0x884, 0x8cc, 0x914, 0xc83, 0xc84, 0xfff} {
		refused(auth, at)
	}
	_, err = VerifyIDBlock(block[1:], auth, true)
	require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
	_, err = VerifyIDBlock(block, auth, true)
	require.NoError(t, err)
}

// TestPublishedIDBlock: values that another implementation's tests expect for these keys and this digest.
func TestPublishedIDBlock(t *testing.T) {
	for _, c := range []struct{ point, want string }{
		{"04b20fd1a1c2bd2b65183a76e2390ac805f6d8e5e2af725e5a8e93cf87ec029f9d45eb326b04b92beb714e14fa986f8a9a" +
			"2c94a0b8ab30cc76352675944876891e954ff6ef5826a6231ba6d6d7f6ebfb68ce330e1e59394efb7080883ddc69364b",
			"hwt+NcU/inLQ0yL3WrKvgmJ5Kq9leWIs5BMcPyHyied8sFYKXjuQs5MuZ07HCcsU"},
		{"0406811fc62409bf2d9ae51c07423254d893c6c23fbf164af3383b0f813a627e6168d9067a7f4bd97990588c18411210a0" +
			"32b420a22656d271dcfd4e25668c72fd58bb5f6851fe472f9d160f880b14df4c3623068962cde4d608e737342da912c9",
			"YxEcNLv8Ckk4+aAJvQdJgNgXIyPmFZnJ/TNtqGcySOHcqY0L6PdjdqEGuK/UwKBX"},
	} {
		raw, err := hex.DecodeString(c.point)
		require.NoError(t, err)
		key, err := ecdsa.ParseUncompressedPublicKey(elliptic.P384(), raw)
		require.NoError(t, err)
		digest, err := KeyDigest(key)
		require.NoError(t, err)
		require.Equal(t, c.want, base64.StdEncoding.EncodeToString(digest[:]))
	}
	digest, err := base64.StdEncoding.DecodeString("B28FLQi9p6cAqipgjFyqawDrrSl7bWioWkWx5mmlWLZ+G5HShKMB/mPE+gdQRn7t")
	require.NoError(t, err)
	require.Equal(t, "B28FLQi9p6cAqipgjFyqawDrrSl7bWioWkWx5mmlWLZ+G5HShKMB/mPE+gdQRn7t"+
		"AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAABAAAAAAAAAAAAAwAAAAAA",
		base64.StdEncoding.EncodeToString(Identity{Digest: Digest(digest), Policy: 0x30000}.Block()))
}

func writeKey(t *testing.T, content []byte, mode os.FileMode) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "key.pem")
	require.NoError(t, os.WriteFile(path, content, 0o600))
	require.NoError(t, os.Chmod(path, mode))
	return path
}

func pemOf(kind string, der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})
}

func TestLoadKey(t *testing.T) {
	key := fixedKey(t, 5)
	sec1, err := x509.MarshalECPrivateKey(key)
	require.NoError(t, err)
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	require.NoError(t, err)
	for name, content := range map[string][]byte{
		"SEC 1":                 pemOf("EC PRIVATE KEY", sec1),
		"PKCS#8":                pemOf("PRIVATE KEY", pkcs8),
		"with curve parameters": append(pemOf("EC PARAMETERS", []byte{6, 5, 43, 129, 4, 0, 34}), pemOf("EC PRIVATE KEY", sec1)...),
	} {
		got, err := LoadKey(writeKey(t, content, 0o600))
		require.NoError(t, err, name)
		require.True(t, key.Equal(got), name)
	}

	p256, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	other, err := x509.MarshalECPrivateKey(p256)
	require.NoError(t, err)
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	require.NoError(t, err)
	otherKind, err := x509.MarshalPKCS8PrivateKey(rsaKey)
	require.NoError(t, err)
	for _, tt := range []struct {
		want    string
		content []byte
		mode    os.FileMode
	}{
		{"0 private keys", nil, 0o600},
		{"0 private keys", []byte("secret text"), 0o600},
		{"2 private keys", append(pemOf("PRIVATE KEY", pkcs8), pemOf("PRIVATE KEY", pkcs8)...), 0o600},
		{"curve is P-256, want P-384", pemOf("EC PRIVATE KEY", other), 0o600},
		{"no elliptic-curve key", pemOf("PRIVATE KEY", otherKind), 0o600},
		{"not readable as PKCS#8", pemOf("PRIVATE KEY", sec1), 0o600},
		{"not readable as SEC 1", pemOf("EC PRIVATE KEY", pkcs8), 0o600},
		{"encrypted", pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Headers: map[string]string{"Proc-Type": "4,ENCRYPTED"}, Bytes: sec1}),
			0o600},
		{`PEM block "PUBLIC KEY"`, pemOf("PUBLIC KEY", sec1), 0o600},
		{"open to all users (mode 0644)", pemOf("PRIVATE KEY", pkcs8), 0o644},
		{"more than the 65536", make([]byte, 65537), 0o600},
	} {
		_, err := LoadKey(writeKey(t, tt.content, tt.mode))
		require.ErrorContains(t, err, tt.want)
		require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
		require.NotContains(t, err.Error(), "secret text")
	}
	_, err = LoadKey(filepath.Join(t.TempDir(), "missing"))
	require.ErrorIs(t, err, os.ErrNotExist)
}

func FuzzParseKey(f *testing.F) {
	sec1, err := base64.StdEncoding.DecodeString("MIGkAgEBBDAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAFoAcGBSuBBAAi")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(pemOf("EC PRIVATE KEY", sec1))
	f.Add(pemOf("PRIVATE KEY", []byte{0x30}))
	f.Add([]byte("-----BEGIN EC PARAMETERS-----\n-----END EC PARAMETERS-----\n"))
	f.Fuzz(func(t *testing.T, raw []byte) {
		key, err := parseKey(raw)
		if err != nil {
			require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
			return
		}
		require.Equal(t, elliptic.P384(), key.Curve)
	})
}
