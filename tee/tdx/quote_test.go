// SPDX-License-Identifier: Apache-2.0

package tdx

import (
	"bytes"
	"encoding/binary"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"

	"github.com/cloister-project/cloister/tee"
)

// testQuote has the number of its field, from 1 on, in each byte of a field.
func testQuote(version, body uint16) []byte {
	le := binary.LittleEndian
	b := le.AppendUint16(nil, version)
	b = le.AppendUint16(b, quoteECDSAP256)
	b = le.AppendUint32(b, quoteTEETDX)
	b = append(b, make([]byte, 40)...)
	sizes := []int{16, 48, 48, 8, 8, 8, 48, 48, 48, 48, 48, 48, 48, 48, 64}
	if body == bodyTD15 {
		sizes = append(sizes, 16, 48)
	}
	if version == quoteVersion5 {
		total := uint32(0)
		for _, s := range sizes {
			total += uint32(s)
		}
		b = le.AppendUint16(b, body)
		b = le.AppendUint32(b, total)
	}
	for n, s := range sizes {
		b = append(b, bytes.Repeat([]byte{byte(n + 1)}, s)...)
	}
	b = le.AppendUint32(b, 9)
	return append(b, "signature"...)
}

func filled(b byte) (d Digest) {
	copy(d[:], bytes.Repeat([]byte{b}, DigestSize))
	return d
}

func TestParseQuote(t *testing.T) {
	for _, tt := range []struct{ version, body uint16 }{{quoteVersion4, bodyTD10}, {quoteVersion5, bodyTD10}, {quoteVersion5, bodyTD15}} {
		raw := testQuote(tt.version, tt.body)
		q, err := ParseQuote(raw)
		require.NoError(t, err)
		want := &Quote{
			Version: tt.version, AttestationKeyType: quoteECDSAP256,
			MRSEAM: filled(2), MRSignerSEAM: filled(3), SEAMAttributes: 0x0404040404040404, Attributes: 0x0505050505050505, XFAM: 0x0606060606060606,
			MRTD: filled(7), MRConfigID: filled(8), MROwner: filled(9), MROwnerConfig: filled(10),
			RTMR:      [4]Digest{filled(11), filled(12), filled(13), filled(14)},
			Signature: []byte("signature"),
		}
		copy(want.TEETCBSVN[:], bytes.Repeat([]byte{1}, 16))
		copy(want.ReportData[:], bytes.Repeat([]byte{15}, 64))
		if tt.body == bodyTD15 {
			want.HasTD15, want.MRServiceTD = true, filled(17)
			copy(want.TEETCBSVN2[:], bytes.Repeat([]byte{16}, 16))
		}
		require.Equal(t, want, q)
		q, err = ParseQuote(append(raw, 0, 0, 0))
		require.NoError(t, err)
		require.Equal(t, want, q, "zeros behind the end")
	}
}

func TestParseQuoteRefuses(t *testing.T) {
	v4 := func() []byte { return testQuote(quoteVersion4, bodyTD10) }
	v5 := func() []byte { return testQuote(quoteVersion5, bodyTD15) }
	for name, raw := range map[string][]byte{
		"empty":            nil,
		"header cut":       v4()[:quoteHeaderSize-1],
		"header only":      v4()[:quoteHeaderSize],
		"body type cut":    v5()[:quoteHeaderSize+5],
		"body cut":         v4()[:quoteHeaderSize+bodyTD10Size-1],
		"no signature":     v4()[:quoteHeaderSize+bodyTD10Size+4],
		"signature cut":    v4()[:len(v4())-1],
		"empty signature":  append(v4()[:quoteHeaderSize+bodyTD10Size], 0, 0, 0, 0),
		"trailing bytes":   append(v4(), 1),
		"too long":         append(v4(), make([]byte, maxQuote)...),
		"version 3":        append([]byte{3}, v4()[1:]...),
		"SGX":              append(append([]byte{}, append(v4()[:4:4], 0)...), v4()[5:]...),
		"unknown key type": append(append([]byte{}, append(v4()[:2:2], 7)...), v4()[3:]...),
		"SGX body":         append(append([]byte{}, append(v5()[:48:48], 1)...), v5()[49:]...),
		"wrong body size":  append(append([]byte{}, append(v5()[:50:50], 1)...), v5()[51:]...),
	} {
		_, err := ParseQuote(raw)
		require.ErrorIs(t, err, errdefs.ErrInvalidArgument, name)
	}
}

func TestCompare(t *testing.T) {
	q, err := ParseQuote(testQuote(quoteVersion5, bodyTD15))
	require.NoError(t, err)
	q.Attributes = AttributeSEPTVEDisable | AttributePKS
	ref := func(change map[string]string) *tee.ReferenceValues {
		values := map[string]string{
			"tdx.mrtd": filled(7).String(), "tdx.mrtd_two_pass": filled(70).String(), "tdx.rtmr0": "",
			"tdx.rtmr1": filled(12).String(), "tdx.rtmr2": filled(13).String(), "tdx.mrconfigid": filled(8).String(),
			"tdx.attributes": "0000001000000000",
		}
		for k, v := range change {
			values[k] = v
		}
		r := &tee.ReferenceValues{Platform: tee.TDX}
		for k, v := range values {
			r.Values = append(r.Values, tee.Value{Name: k, Hex: v})
		}
		return r
	}
	require.NoError(t, q.Compare(ref(nil)))
	require.NoError(t, q.Compare(ref(map[string]string{"tdx.mrtd": filled(1).String(), "tdx.mrtd_two_pass": filled(7).String()})))
	require.NoError(t, q.Compare(ref(map[string]string{"tdx.attributes": "0000005000000000"})))
	for _, name := range []string{"tdx.mrtd", "tdx.rtmr0", "tdx.rtmr1", "tdx.rtmr2", "tdx.mrconfigid", "tdx.attributes"} {
		err := q.Compare(ref(map[string]string{name: filled(99).String()}))
		require.ErrorIs(t, err, errdefs.ErrFailedPrecondition)
		require.ErrorContains(t, err, name)
	}
	q.Attributes |= AttributeDebug
	require.ErrorContains(t, q.Compare(ref(nil)), "tdx.attributes is 0100005000000000")
	require.ErrorIs(t, q.Compare(&tee.ReferenceValues{Platform: tee.SNP}), errdefs.ErrInvalidArgument)
	require.ErrorIs(t, q.Compare(nil), errdefs.ErrInvalidArgument)
	require.ErrorContains(t, q.Compare(&tee.ReferenceValues{Platform: tee.TDX}), "tdx.mrtd", "no predicted values fit nothing")
}

func FuzzParseQuote(f *testing.F) {
	f.Add(testQuote(quoteVersion4, bodyTD10))
	f.Add(testQuote(quoteVersion5, bodyTD10))
	f.Add(testQuote(quoteVersion5, bodyTD15))
	f.Add(testQuote(quoteVersion5, bodyTD15)[:100])
	f.Fuzz(func(t *testing.T, raw []byte) {
		q, err := ParseQuote(raw)
		switch {
		case err != nil && !errdefs.IsInvalidArgument(err):
			t.Fatal(err)
		case err == nil && (len(q.Signature) == 0 || len(q.Signature) > len(raw)-quoteHeaderSize-bodyTD10Size):
			t.Fatalf("a signature of %d bytes in a quote of %d", len(q.Signature), len(raw))
		}
	})
}
