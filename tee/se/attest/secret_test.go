// SPDX-License-Identifier: Apache-2.0

package attest

import (
	"crypto/ecdh"
	"encoding/hex"
	"encoding/json"
	mathrand "math/rand/v2"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
)

func testSecret(t testing.TB) (*Secret, []byte) {
	_, s, err := NewRequest([]*ecdh.PublicKey{newKey(t, 1).PublicKey(), newKey(t, 2).PublicKey()}, AttestHostKey,
		mathrand.NewChaCha8([32]byte{3}))
	require.NoError(t, err)
	b, err := json.MarshalIndent(s, "", "  ")
	require.NoError(t, err)
	return s, b
}

func TestSecretFile(t *testing.T) {
	s, b := testSecret(t)
	got, err := ParseSecret(append(b, '\n'))
	require.NoError(t, err)
	require.Equal(t, s, got)

	for name, change := range map[string]func(string) string{
		"empty": func(string) string { return "" },
		"cut":   func(s string) string { return s[:len(s)-2] },
		"two":   func(s string) string { return s + s },
		"more":  func(s string) string { return strings.Replace(s, `"nonce"`, `"x": 1, "nonce"`, 1) },
		"short key": func(s string) string {
			return strings.Replace(s, `"measurement_key": "`, `"measurement_key": "", "y": "`, 1)
		},
		"odd digits":  func(s string) string { return strings.Replace(s, `"nonce": "`, `"nonce": "0`, 1) },
		"short nonce": func(s string) string { return strings.Replace(s, `"nonce": "`, `"nonce": "00`, 1) },
		"flags":       func(s string) string { return strings.Replace(s, `"flags": `, `"flags": 1`, 1) },
		"no keys":     func(s string) string { return s[:strings.Index(s, `"host_key_hashes"`)] + `"host_key_hashes": []}` },
		"long":        func(s string) string { return s + strings.Repeat(" ", maxSecretFile) },
	} {
		_, err := ParseSecret([]byte(change(string(b))))
		require.ErrorIs(t, err, errdefs.ErrInvalidArgument, name)
		require.NotContains(t, err.Error(), hex.EncodeToString(s.Key[:8]), name)
	}
}

func FuzzParseSecret(f *testing.F) {
	_, b := testSecret(f)
	f.Add(b)
	f.Add([]byte("{}"))
	f.Fuzz(func(t *testing.T, b []byte) {
		s, err := ParseSecret(b)
		if err != nil {
			return
		}
		again, err := json.Marshal(s)
		require.NoError(t, err)
		same, err := ParseSecret(again)
		require.NoError(t, err)
		require.Equal(t, s, same)
	})
}
