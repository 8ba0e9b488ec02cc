// SPDX-License-Identifier: Apache-2.0

package initdata

import (
	"crypto/sha256"
	"crypto/sha512"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"unicode/utf8"

	"github.com/containerd/errdefs"
	"github.com/pelletier/go-toml/v2"
	"github.com/pelletier/go-toml/v2/unstable"
)

// Limits of a document.
const (
	// MaxRaw bounds the TOML text, bytes: what the 256 KiB that Kubernetes allows for a pod's annotations can hold of
	// compressed text (policies, configuration and certificates shrink to a sixth or less of their size, and grow by a
	// third in base64). It also bounds what the agent reads, and twice keeps, in guest memory before anything is checked.
	MaxRaw = 2 << 20
	// MaxEntries bounds the documents in [data], MaxName the length of their names.
	MaxEntries = 64
	MaxName    = 256
)

// Version is the one version of the format.
const Version = "0.1.0"

// Algorithm of the digest.
type Algorithm string

// Algorithms. Documents may spell them with a dash ("sha-384").
const (
	SHA256 Algorithm = "sha256"
	SHA384 Algorithm = "sha384"
	SHA512 Algorithm = "sha512"
)

// Document is a parsed initdata document. It is not changed after Parse.
type Document struct {
	// Raw is the TOML text that the digest is of.
	Raw       []byte
	Algorithm Algorithm
	// Data are the named documents.
	Data map[string]string
}

// Parse checks a TOML text. Errors are errdefs.ErrInvalidArgument and name the fault.
func Parse(raw []byte) (*Document, error) {
	if len(raw) > MaxRaw {
		return nil, invalid("has %d bytes; the limit is %d", len(raw), MaxRaw)
	}
	if !utf8.Valid(raw) {
		return nil, invalid("is not UTF-8 text")
	}
	if err := checkShape(raw); err != nil {
		return nil, err
	}
	var text struct {
		Version   string            `toml:"version"`
		Algorithm string            `toml:"algorithm"`
		Data      map[string]string `toml:"data"`
	}
	d := toml.NewDecoder(strings.NewReader(string(raw))).DisallowUnknownFields()
	if err := d.Decode(&text); err != nil {
		var unknown *toml.StrictMissingError
		if errors.As(err, &unknown) && len(unknown.Errors) > 0 {
			return nil, invalid("has the key %q; known are version, algorithm and the table [data], whose values are texts",
				clip(strings.Join(unknown.Errors[0].Key(), ".")))
		}
		return nil, invalid("is no TOML of its kind: %v", err)
	}
	if text.Version != Version {
		return nil, invalid("has version %q; only %q is known", clip(text.Version), Version)
	}
	algorithm, err := parseAlgorithm(text.Algorithm)
	if err != nil {
		return nil, err
	}
	if len(text.Data) > MaxEntries {
		return nil, invalid("has %d entries in [data]; the limit is %d", len(text.Data), MaxEntries)
	}
	for name := range text.Data {
		if name == "" || len(name) > MaxName || strings.ContainsAny(name, "\x00\n") {
			return nil, invalid("has an entry in [data] with the name %q; names have 1 to %d bytes on one line", clip(name), MaxName)
		}
	}
	return &Document{Raw: raw, Algorithm: algorithm, Data: text.Data}, nil
}

// checkShape walks the text's expressions and stops at the first that no document has: the decoder, which keeps books of
// tables and of unknown keys, takes minutes and hundreds of megabytes for some texts of MaxRaw bytes.
func checkShape(raw []byte) error {
	// version, algorithm and [data] beside the entries.
	const most = MaxEntries + 3
	var p unstable.Parser
	p.Reset(raw)
	for n := 1; p.NextExpression(); n++ {
		if n > most {
			return invalid("has more than %d keys and tables: %d entries in [data] are the limit", most, MaxEntries)
		}
		e := p.Expression()
		if e.Kind == unstable.ArrayTable {
			return invalid("has an array of tables ([[...]]); known are version, algorithm and the table [data]")
		}
		parts := 0
		for key := e.Key(); key.Next(); parts++ {
			if parts == 2 {
				return invalid("has a key of more than two parts; known are version, algorithm and the entries of [data]")
			}
		}
		if e.Kind == unstable.KeyValue {
			if err := checkValue(e.Value()); err != nil {
				return err
			}
		}
	}
	if err := p.Error(); err != nil {
		return invalid("is no TOML of its kind: %v", err)
	}
	return nil
}

// checkValue takes texts, and inline tables of texts.
func checkValue(v *unstable.Node) error {
	if v.Kind == unstable.String {
		return nil
	}
	if v.Kind != unstable.InlineTable {
		return invalid("is no TOML of its kind: it has a value that is no text (%s)", v.Kind)
	}
	n := 0
	for it := v.Children(); it.Next(); n++ {
		if n == MaxEntries {
			return invalid("has more than %d entries in an inline table", MaxEntries)
		}
		entry := it.Node()
		if key := entry.Key(); entry.Kind != unstable.KeyValue || entry.Value().Kind != unstable.String || !key.Next() || key.Next() {
			return invalid("is no TOML of its kind: entries of an inline table are names and texts")
		}
	}
	return nil
}

func parseAlgorithm(s string) (Algorithm, error) {
	switch a := Algorithm(strings.ToLower(strings.Replace(s, "-", "", 1))); a {
	case SHA256, SHA384, SHA512:
		return a, nil
	}
	return "", invalid("has algorithm %q; known are sha256, sha384 and sha512", clip(s))
}

// Digest is the digest of Raw by Algorithm: 32, 48 or 64 bytes.
func (d *Document) Digest() []byte {
	switch d.Algorithm {
	case SHA256:
		sum := sha256.Sum256(d.Raw)
		return sum[:]
	case SHA384:
		sum := sha512.Sum384(d.Raw)
		return sum[:]
	default:
		sum := sha512.Sum512(d.Raw)
		return sum[:]
	}
}

// String is the digest with its algorithm, "sha384:HEX".
func (d *Document) String() string { return string(d.Algorithm) + ":" + hex.EncodeToString(d.Digest()) }

// Bind fits a digest to a register of size bytes: a longer digest is cut, a shorter one padded with zero bytes.
func Bind(digest []byte, size int) []byte {
	out := make([]byte, size)
	copy(out, digest)
	return out
}

func invalid(format string, a ...any) error {
	return fmt.Errorf("initdata "+format+": %w", append(a, errdefs.ErrInvalidArgument)...)
}

func clip(s string) string {
	if len(s) > 64 {
		return s[:64] + "…"
	}
	return s
}
