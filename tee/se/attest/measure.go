// SPDX-License-Identifier: Apache-2.0

package attest

import (
	"crypto/hmac"
	"crypto/sha512"
	"encoding/binary"
	"fmt"
	"slices"

	"github.com/containerd/errdefs"

	"github.com/cloister-project/cloister/tee/initdata"
	"github.com/cloister-project/cloister/tee/se/hostkey"
	"github.com/cloister-project/cloister/tee/se/image"
)

// UserDataSize is the length of UserData, in bytes.
const UserDataSize = 64

// UserData is what belongs into the user data of a guest's evidence: the digest of the initdata document
// that it accepted, in the document's own algorithm, padded with zeros; without one, zeros. That is the value of
// the sealed parameter cloister.initdata too.
func UserData(initdataDigest []byte) [UserDataSize]byte {
	return [UserDataSize]byte(initdata.Bind(initdataDigest, UserDataSize))
}

// Measured is what a measurement is computed over.
type Measured struct {
	Header *image.Header
	// CUID is the running configuration's unique id, made by the ultravisor.
	CUID [CUIDSize]byte
	// User is the guest's data, at most MaxUser bytes; Additional is the machine's.
	User, Additional []byte
}

// Measure computes the answer to a request; nonce nil is for a request without one.
func Measure(key [KeySize]byte, nonce *[NonceSize]byte, m Measured) [MeasurementSize]byte {
	h := hmac.New(sha512.New, key[:])
	h.Write(m.Header.PLD[:])
	h.Write(m.Header.ALD[:])
	h.Write(m.Header.TLD[:])
	h.Write(m.Header.Tag[:])
	h.Write(m.CUID[:])
	sizes := binary.BigEndian.AppendUint16(nil, uint16(len(m.User)))
	sizes = append(sizes, 0, 0)
	h.Write(binary.BigEndian.AppendUint32(sizes, uint32(len(m.Additional))))
	h.Write(m.User)
	if nonce != nil {
		h.Write(nonce[:])
	}
	h.Write(m.Additional)
	return [MeasurementSize]byte(h.Sum(nil))
}

// Evidence is what an answer says once it is verified.
type Evidence struct {
	CUID image.Hex `json:"cuid"`
	User image.Hex `json:"user_data,omitempty"`
	// ImageHostKey and AttestHostKey are hashes of host keys, the others hashes as the machine gives them; empty where the
	// request did not ask.
	ImageHostKey  image.Hex `json:"image_phkh,omitempty"`
	AttestHostKey image.Hex `json:"attestation_phkh,omitempty"`
	SecretStore   image.Hex `json:"secret_store_hash,omitempty"`
	Firmware      image.Hex `json:"firmware_hash,omitempty"`
}

// Verify checks an answer to the request that s belongs to, from a guest that should run the image with a header. The
// measurement is compared first: nothing of an answer is looked at before. Then the host keys that the machine names
// must be such that the header and the request have a slot for. The request in the answer is not used: only s knows what was
// sent. errdefs.ErrPermissionDenied: the answer is not good.
func Verify(s *Secret, header *image.Header, answer *Exchange) (*Evidence, error) {
	deny := func(format string, a ...any) (*Evidence, error) {
		return nil, fmt.Errorf("attestation: %s: %w", fmt.Sprintf(format, a...), errdefs.ErrPermissionDenied)
	}
	if len(answer.Measurement) != MeasurementSize || answer.CUID == nil {
		return deny("the exchange holds no answer")
	}
	want := Measure(s.Key, &s.Nonce, Measured{Header: header, CUID: *answer.CUID, User: answer.User, Additional: answer.Additional})
	if !hmac.Equal(want[:], answer.Measurement) {
		return deny("the measurement is not that of this image, this request and this answer")
	}
	if n := s.Flags.AdditionalSize(); len(answer.Additional) < n {
		return deny("%d bytes of additional data, %d were asked for", len(answer.Additional), n)
	}
	e := &Evidence{CUID: answer.CUID[:], User: answer.User}
	rest := answer.Additional
	for i, to := range []*image.Hex{&e.ImageHostKey, &e.AttestHostKey, &e.SecretStore, &e.Firmware} {
		if s.Flags&additional[i].flag != 0 {
			*to, rest = rest[:additional[i].size], rest[additional[i].size:]
		}
	}
	if e.ImageHostKey != nil && !slices.Contains(header.HostKeyHashes(), [hostkey.HashSize]byte(e.ImageHostKey)) {
		return deny("host key %s opened the image, which has no slot for it", e.ImageHostKey)
	}
	if e.AttestHostKey != nil && !slices.Contains(s.HostKeys, [hostkey.HashSize]byte(e.AttestHostKey)) {
		return deny("host key %s opened the request, which has no slot for it", e.AttestHostKey)
	}
	return e, nil
}
