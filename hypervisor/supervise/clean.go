// SPDX-License-Identifier: Apache-2.0

package supervise

import (
	"unicode"
	"unicode/utf8"
)

// Clean returns the text without control characters and terminal sequences; new lines and tabs stay.
func Clean(s string) string { return string((&cleaner{}).filter([]byte(s))) }

// cleaner removes control characters and terminal sequences from a stream, whatever its pieces are.
type cleaner struct {
	state   cleanState
	partial []byte // a rune's first bytes, less than utf8.UTFMax
}

type cleanState byte

const (
	cleanText   cleanState = iota
	cleanEscape            // after ESC
	cleanCSI               // in a control sequence, up to its final byte
)

func (c *cleaner) filter(p []byte) []byte {
	p = append(c.partial, p...)
	c.partial = nil
	out := make([]byte, 0, len(p))
	for len(p) > 0 {
		if !utf8.FullRune(p) {
			c.partial = append([]byte(nil), p...)
			break
		}
		r, n := utf8.DecodeRune(p)
		p = p[n:]
		switch c.state {
		case cleanEscape:
			c.state = cleanText
			if r == '[' {
				c.state = cleanCSI
			}
			continue
		case cleanCSI:
			if r >= 0x40 && r <= 0x7e {
				c.state = cleanText
				continue
			}
			if r >= 0x20 && r < 0x40 {
				continue
			}
			c.state = cleanText // not a sequence after all
		}
		switch {
		case r == 0x1b:
			c.state = cleanEscape
		case r == '\n' || r == '\t':
			out = append(out, byte(r))
		case r == utf8.RuneError:
			out = append(out, '?')
		case unicode.IsPrint(r):
			out = utf8.AppendRune(out, r)
		}
	}
	return out
}
