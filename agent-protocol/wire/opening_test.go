// SPDX-License-Identifier: Apache-2.0

package wire

import (
	"bytes"
	"fmt"
	"io"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestStreamID(t *testing.T) {
	id := NewStreamID()
	back, err := ParseStreamID(id.String())
	require.NoError(t, err)
	require.Equal(t, id, back)
	for _, bad := range []string{"", "00", strings.Repeat("g", 32), strings.ToUpper(strings.Repeat("ab", 16)), strings.Repeat("0", 33)} {
		_, err := ParseStreamID(bad)
		require.Error(t, err, bad)
	}
}

func TestToken(t *testing.T) {
	token := NewToken()
	require.NotEqual(t, token, NewToken())
	require.True(t, token.Equal(token))
	require.False(t, token.Equal(NewToken()))
	back, err := ParseToken(token[:])
	require.NoError(t, err)
	require.Equal(t, token, back)
	for _, bad := range [][]byte{nil, token[1:], append(token[:], 0), make([]byte, TokenLen)} {
		_, err := ParseToken(bad)
		require.Error(t, err)
	}
	// It is in no log by accident.
	for _, verb := range []string{"%v", "%+v", "%s", "%#v"} {
		require.Equal(t, "{(secret)}", "{"+fmt.Sprintf(verb, token)+"}", verb)
	}
}

// The opening is the token, and the stream's id behind it; the answer is a byte, or nothing.
func TestOpening(t *testing.T) {
	token, id := NewToken(), NewStreamID()
	for _, tc := range []struct {
		answer []byte
		want   string
	}{{[]byte{Accepted}, ""}, {[]byte{Refused}, "the agent refused it"}, {nil, "EOF"}} {
		for name, open := range map[string]func(io.ReadWriter) error{
			"rpc":    func(rw io.ReadWriter) error { return OpenRPC(rw, token) },
			"stream": func(rw io.ReadWriter) error { return OpenStream(rw, token, id) },
		} {
			var sent bytes.Buffer
			err := open(struct {
				io.Reader
				io.Writer
			}{bytes.NewReader(tc.answer), &sent})
			if tc.want == "" {
				require.NoError(t, err, name)
			} else {
				require.ErrorContains(t, err, tc.want, name)
			}
			got, err := ReadToken(&sent)
			require.NoError(t, err)
			require.Equal(t, token, got)
			if name == "stream" {
				named, err := ReadStreamID(&sent)
				require.NoError(t, err)
				require.Equal(t, id, named)
			}
			require.Zero(t, sent.Len())
		}
	}
}
