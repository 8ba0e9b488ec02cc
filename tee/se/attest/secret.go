// SPDX-License-Identifier: Apache-2.0

package attest

import (
	"bytes"
	"encoding/json"
	"fmt"

	"github.com/containerd/errdefs"

	"github.com/cloister-project/cloister/tee/se/hostkey"
	"github.com/cloister-project/cloister/tee/se/image"
)

// maxSecretFile bounds a secret in JSON, in bytes.
const maxSecretFile = 64 << 10

// secretFile is a Secret in JSON.
type secretFile struct {
	Key      image.Hex   `json:"measurement_key"`
	Nonce    image.Hex   `json:"nonce"`
	Flags    uint64      `json:"flags"`
	HostKeys []image.Hex `json:"host_key_hashes"`
}

// MarshalJSON returns what ParseSecret reads. It has the keys in clear.
func (s *Secret) MarshalJSON() ([]byte, error) {
	f := secretFile{Key: s.Key[:], Nonce: s.Nonce[:], Flags: uint64(s.Flags)}
	for _, h := range s.HostKeys {
		f.HostKeys = append(f.HostKeys, h[:])
	}
	return json.Marshal(f)
}

// ParseSecret reads a secret that was kept as JSON. Errors do not show what is in it.
func ParseSecret(b []byte) (*Secret, error) {
	fault := func(what string) (*Secret, error) {
		return nil, fmt.Errorf("attestation secret: %s: %w", what, errdefs.ErrInvalidArgument)
	}
	if len(b) > maxSecretFile {
		return fault("it is too large")
	}
	var f secretFile
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if d.Decode(&f) != nil {
		return fault("it is not the JSON that was written with the request")
	}
	if d.More() {
		return fault("something follows it")
	}
	if len(f.Key) != KeySize || len(f.Nonce) != NonceSize || Flags(f.Flags)&nonceFlag == 0 || Flags(f.Flags)&^knownFlags != 0 {
		return fault("key, nonce or flags are not of the right size")
	}
	s := &Secret{Key: [KeySize]byte(f.Key), Nonce: [NonceSize]byte(f.Nonce), Flags: Flags(f.Flags)}
	if len(f.HostKeys) == 0 || len(f.HostKeys) > MaxHostKeys {
		return fault("it names no host key, or too many")
	}
	for _, h := range f.HostKeys {
		if len(h) != hostkey.HashSize {
			return fault("a host key's hash is not of the right size")
		}
		s.HostKeys = append(s.HostKeys, [hostkey.HashSize]byte(h))
	}
	return s, nil
}
