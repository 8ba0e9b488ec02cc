// SPDX-License-Identifier: Apache-2.0

package virtcontainers

import (
	"strings"

	"github.com/containerd/errdefs"
)

// guestRefusal is a guest's own word that it does not go on: its launch is not what it has to be. It is an
// errdefs.ErrFailedPrecondition.
type guestRefusal struct {
	words string
}

func (e *guestRefusal) Error() string { return "the guest refuses to run: " + e.words }

func (e *guestRefusal) Unwrap() error { return errdefs.ErrFailedPrecondition }

// maxSentence bounds what is quoted of a guest.
const maxSentence = 1024

// sentence makes a bounded, harmless line of what a guest says.
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
