// SPDX-License-Identifier: Apache-2.0

package evidence

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"

	"github.com/cloister-project/cloister/tee"
	"github.com/cloister-project/cloister/tee/snp/snpreport"
)

// report is an SNP report by the layout of AMD 56860: version 2, policy, host data and measurement.
func report() []byte {
	b := make([]byte, snpreport.Size)
	binary.LittleEndian.PutUint32(b, 2)
	binary.LittleEndian.PutUint64(b[8:], 0x30000)
	copy(b[0xc0:], bytes.Repeat([]byte{0xaa}, 32))
	copy(b[0x90:], bytes.Repeat([]byte{0xbb}, 48))
	return b
}

// quote is a TDX quote of version 4 whose fields are filled with their number, MRTD is 7.
func quote() []byte {
	le := binary.LittleEndian
	b := le.AppendUint16(nil, 4)
	b = le.AppendUint16(b, 2)
	b = le.AppendUint32(b, 0x81)
	b = append(b, make([]byte, 40)...)
	for n, size := range []int{16, 48, 48, 8, 8, 8, 48, 48, 48, 48, 48, 48, 48, 48, 64} {
		b = append(b, bytes.Repeat([]byte{byte(n + 1)}, size)...)
	}
	return append(le.AppendUint32(b, 3), "sig"...)
}

func values(e *Evidence) map[string]string {
	all := make(map[string]string)
	for _, v := range e.Values {
		all[v.Name] = v.Hex
	}
	return all
}

func TestReport(t *testing.T) {
	e, err := Read(report())
	require.NoError(t, err)
	require.Equal(t, tee.SNP, e.Platform)
	got := values(e)
	require.Equal(t, strings.Repeat("bb", 48), got["snp.launch_digest"])
	require.Equal(t, strings.Repeat("aa", 32), got["snp.host_data"])
	require.Equal(t, "0000030000000000", got["snp.policy"], "as the report has it")

	want := &tee.ReferenceValues{Platform: tee.SNP, Values: []tee.Value{
		{Name: "snp.launch_digest", Hex: strings.Repeat("bb", 48)}, {Name: "snp.policy", Hex: "0000030000000000"},
	}}
	_, err = e.Compare(want)
	require.ErrorIs(t, err, errdefs.ErrInvalidArgument, "any initdata would do")
	require.ErrorContains(t, err, "snp.host_data is missing")
	want.Values = append(want.Values, tee.Value{Name: "snp.host_data", Hex: strings.Repeat("00", 32)})
	_, err = e.Compare(want)
	require.ErrorContains(t, err, "snp.host_data is aa", "the host's initdata")
	want.Values[2].Hex = strings.Repeat("aa", 32)
	open, err := e.Compare(want)
	require.NoError(t, err)
	require.Empty(t, open)
	want.Values[0].Hex = strings.Repeat("bc", 48)
	want.Values = append(want.Values, tee.Value{Name: "snp.other", Hex: "00"})
	_, err = e.Compare(want)
	require.ErrorIs(t, err, errdefs.ErrFailedPrecondition)
	require.ErrorContains(t, err, "snp.launch_digest is bb")
	require.ErrorContains(t, err, "snp.other is , predicted was 00")
}

func TestQuote(t *testing.T) {
	e, err := Read(quote())
	require.NoError(t, err)
	require.Equal(t, tee.TDX, e.Platform)
	got := values(e)
	require.Equal(t, strings.Repeat("07", 48), got["tdx.mrtd"])
	require.Equal(t, strings.Repeat("0b", 48), got["tdx.rtmr0"])
	require.Equal(t, "0505050505050505", got["tdx.attributes"])
	want := &tee.ReferenceValues{Platform: tee.TDX, Values: []tee.Value{
		{Name: "tdx.mrtd", Hex: got["tdx.mrtd"]}, {Name: "tdx.mrconfigid", Hex: got["tdx.mrconfigid"]}, {Name: "tdx.attributes",
			Hex: got["tdx.attributes"]},
	}, Unpredicted: []tee.Unpredicted{{Name: "tdx.rtmr0", Reason: "no tables"}, {Name: "tdx.rtmr1", Reason: "unknown firmware"}}}
	_, err = e.Compare(want)
	require.ErrorIs(t, err, errdefs.ErrInvalidArgument, "any kernel would do")
	require.ErrorContains(t, err, "tdx.rtmr1 is missing: unknown firmware")
	require.ErrorContains(t, err, "tdx.rtmr2 is missing")
	want.Values = append(want.Values, tee.Value{Name: "tdx.rtmr1", Hex: got["tdx.rtmr1"]}, tee.Value{Name: "tdx.rtmr2", Hex: got["tdx.rtmr2"]})
	open, err := e.Compare(want)
	require.NoError(t, err)
	require.Equal(t, []tee.Unpredicted{{Name: "tdx.rtmr0", Reason: "no tables"}}, open)
	want.Values[0].Hex = got["tdx.rtmr0"]
	_, err = e.Compare(want)
	require.ErrorContains(t, err, "tdx.mrtd is 07")
}

func TestOtherThings(t *testing.T) {
	for _, raw := range [][]byte{nil, []byte("hello"), report()[:100], append(quote(), 1), make([]byte, MaxSize+1)} {
		_, err := Read(raw)
		require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
		require.ErrorContains(t, err, "SEV-SNP")
		require.ErrorContains(t, err, "TDX quote")
	}
	e, err := Read(report())
	require.NoError(t, err)
	for _, want := range []*tee.ReferenceValues{nil, {Platform: tee.TDX}, {Platform: tee.SNP}} {
		_, err := e.Compare(want)
		require.ErrorIs(t, err, errdefs.ErrInvalidArgument, "nothing to compare with is no match")
	}
}

// Nothing here may be taken for a verified statement.
func TestItIsNotVerified(t *testing.T) {
	for _, raw := range [][]byte{report(), quote()} {
		e, err := Read(raw)
		require.NoError(t, err)
		text, err := json.Marshal(e)
		require.NoError(t, err)
		require.Contains(t, string(text), `"verified":false`)
	}
}

func FuzzRead(f *testing.F) {
	f.Add(report())
	f.Add(quote())
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, raw []byte) {
		e, err := Read(raw)
		if err != nil {
			return
		}
		for _, v := range e.Values {
			_, err := hex.DecodeString(v.Hex)
			require.NoError(t, err, v.Name)
		}
	})
}
