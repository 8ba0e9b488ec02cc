// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"strings"
	"unicode"
	"unicode/utf8"
)

// Bounds of what is quoted of a guest.
const (
	maxWord     = 128
	maxSentence = 1024
	// maxError bounds the words of an agent's error, which may list much.
	maxError = 8 << 10
)

// Word returns a short, harmless word of what a guest says, without spaces and equals signs.
func Word(s string) string {
	if len(s) > maxWord {
		s = s[:maxWord]
	}
	return strings.Map(func(r rune) rune {
		switch {
		case r == ' ':
			return '-'
		case r < ' ' || r > '~' || r == '=':
			return '?'
		}
		return r
	}, s)
}

// sentence returns a bounded, harmless line of what a guest says.
func sentence(s string) string {
	cut := len(s) > maxSentence
	if cut {
		s = s[:maxSentence]
	}
	s = strings.Map(func(r rune) rune {
		switch {
		case r == '\n' || r == '\t':
			return ' '
		case r < ' ' || r > '~':
			return '?'
		}
		return r
	}, s)
	if cut {
		s += "..."
	}
	return strings.TrimSpace(s)
}

// text bounds a guest's words, lines and other languages included, and takes out what a terminal would act upon.
func text(s string) string {
	if len(s) > maxError {
		s = s[:maxError] + "..."
	}
	return strings.Map(func(r rune) rune {
		if unicode.IsControl(r) && r != '\n' && r != '\t' || r == utf8.RuneError {
			return '?'
		}
		return r
	}, s)
}
