// SPDX-License-Identifier: Apache-2.0

package virtcontainers

import (
	"fmt"
	"strings"

	"github.com/containerd/errdefs"

	agentv1 "github.com/cloister-project/cloister/agent-protocol/v1"
	"github.com/cloister-project/cloister/tee"
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

// checkHello compares what the guest says of its launch with what was launched. It protects nobody from a hostile guest;
// it finds a guest image of another release, or one that was sealed for something else.
func (l *launch) checkHello(h *agentv1.Hello) error {
	want := l.name()
	got := tee.Name(h.GetTee())
	if got == "" {
		got = tee.None
	}
	if got != want {
		return fmt.Errorf("the VM was launched with tee.platform = %q and its guest says %q: build or seal the guest image for this platform: %w",
			want, sentence(string(got)), errdefs.ErrFailedPrecondition)
	}
	if digest := l.initdata.digest(); h.GetInitdata() != digest {
		return fmt.Errorf("the pod's initdata is %s and the guest found %s bound to its launch: %w",
			orNone(digest), orNone(sentence(h.GetInitdata())), errdefs.ErrFailedPrecondition)
	}
	return nil
}

func orNone(s string) string {
	if s == "" {
		return "none"
	}
	return s
}
