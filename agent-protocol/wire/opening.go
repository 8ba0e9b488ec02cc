// SPDX-License-Identifier: Apache-2.0

package wire

import (
	"crypto/rand"
	"crypto/subtle"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
)

// TokenLen is the length of a Token in bytes.
const TokenLen = 32

// Token proves to the agent that a connection comes from the shim that launched its VM. The shim makes one for each VM and
// tells it to the agent in HelloReply; every later connection to the agent begins with it. An address proves nothing: with
// the kernel's vsock each process of the host reaches each guest, as context id 2.
//
// In a confidential guest the token keeps other users of the host away, not the host itself, which knows it.
type Token [TokenLen]byte

// NewToken makes a random token.
func NewToken() Token {
	var t Token
	_, _ = rand.Read(t[:]) // never fails, see crypto/rand
	return t
}

// ParseToken takes a token out of HelloReply.
func ParseToken(b []byte) (Token, error) {
	if len(b) != TokenLen {
		return Token{}, fmt.Errorf("the launch's token has %d bytes, want %d", len(b), TokenLen)
	}
	t := Token(b)
	if t == (Token{}) {
		return Token{}, errors.New("the launch's token is all zeros")
	}
	return t, nil
}

// Equal reports whether the tokens are the same, in constant time.
func (t Token) Equal(o Token) bool { return subtle.ConstantTimeCompare(t[:], o[:]) == 1 }

// String hides the token: it is a secret, and belongs into no log.
func (Token) String() string { return "(secret)" }

// GoString is String.
func (t Token) GoString() string { return t.String() }

// Answers of the agent to the opening of a connection. One that does not begin with the token is closed without an answer.
const (
	Accepted = 0
	// Refused: too many connections, or a stream's id was used before.
	Refused = 1
)

// StreamIDLen is the length of a stream's id in bytes.
const StreamIDLen = 16

// StreamID names a stdio stream: random, chosen by the host, used once.
type StreamID [StreamIDLen]byte

// NewStreamID makes a random id.
func NewStreamID() StreamID {
	var id StreamID
	_, _ = rand.Read(id[:]) // never fails, see crypto/rand
	return id
}

// String returns the id as 32 lower-case hex digits, as it stands in agentv1.Stdio.
func (id StreamID) String() string { return hex.EncodeToString(id[:]) }

// ParseStreamID is the reverse of String.
func ParseStreamID(s string) (StreamID, error) {
	var id StreamID
	if len(s) != 2*StreamIDLen {
		return id, fmt.Errorf("stream id has %d characters, want %d", len(s), 2*StreamIDLen)
	}
	if _, err := hex.Decode(id[:], []byte(s)); err != nil {
		return id, fmt.Errorf("stream id: %w", err)
	}
	if id.String() != s {
		return id, errors.New("stream id is not lower-case hex")
	}
	return id, nil
}

// OpenRPC opens a fresh connection to RPCPort: it proves the token and waits for the agent's answer. The agent hangs up
// (io.EOF, or a reset) on a token that is not its own, and when others' connections crowd this one out.
func OpenRPC(rw io.ReadWriter, token Token) error {
	if err := open(rw, token[:]); err != nil {
		return fmt.Errorf("open a connection to the agent: %w", err)
	}
	return nil
}

// OpenStream is OpenRPC for a stdio stream, on StreamPort: it names the stream too.
func OpenStream(rw io.ReadWriter, token Token, id StreamID) error {
	if err := open(rw, append(token[:len(token):len(token)], id[:]...)); err != nil {
		return fmt.Errorf("open a stdio stream: %w", err)
	}
	return nil
}

func open(rw io.ReadWriter, opening []byte) error {
	if _, err := rw.Write(opening); err != nil {
		return err
	}
	var answer [1]byte
	if _, err := io.ReadFull(rw, answer[:]); err != nil {
		return fmt.Errorf("read the agent's answer: %w", err)
	}
	if answer[0] != Accepted {
		return errors.New("the agent refused it: too many connections are open, or the stream's id was used before")
	}
	return nil
}

// ReadToken reads what every connection to the agent begins with.
func ReadToken(r io.Reader) (Token, error) {
	var t Token
	_, err := io.ReadFull(r, t[:])
	return t, err
}

// ReadStreamID reads what follows the token on StreamPort. The caller answers with Accepted or Refused.
func ReadStreamID(r io.Reader) (StreamID, error) {
	var id StreamID
	_, err := io.ReadFull(r, id[:])
	return id, err
}
