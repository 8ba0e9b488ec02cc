// SPDX-License-Identifier: Apache-2.0

package hybrid

import (
	"errors"
	"fmt"
	"io"
	"strings"
	"syscall"

	"github.com/containerd/errdefs"

	"github.com/cloister-project/cloister/hypervisor/vsock"
)

const (
	answerPrefix = "OK "
	// maxAnswer is the longest answer with its line feed: the prefix and 32 bits in decimal, with room to spare.
	maxAnswer = 32
)

// readAnswer reads the line that answers CONNECT, and not a byte of the stream behind it. What follows the prefix is a port
// whose meaning differs between implementations. No answer at all is vsock.ErrRefused, another one errdefs.ErrInvalidArgument.
func readAnswer(r io.Reader) error {
	line := make([]byte, 0, maxAnswer)
	for len(line) < maxAnswer {
		next := line[len(line) : len(line)+1]
		if _, err := io.ReadFull(r, next); err != nil {
			ended := errors.Is(err, io.EOF) || errors.Is(err, syscall.ECONNRESET)
			switch {
			case ended && len(line) == 0:
				return fmt.Errorf("%w (no answer to CONNECT)", vsock.ErrRefused)
			case ended:
				return fmt.Errorf("the VMM's answer to CONNECT ends after %q: %w", line, io.ErrUnexpectedEOF)
			}
			return err
		}
		line = line[:len(line)+1]
		if next[0] == '\n' {
			if !strings.HasPrefix(string(line), answerPrefix) {
				return fmt.Errorf("the VMM answers CONNECT with %q, not with %q: %w", line, answerPrefix, errdefs.ErrInvalidArgument)
			}
			return nil
		}
	}
	return fmt.Errorf("the VMM's answer to CONNECT has no end within %d bytes: %q: %w", maxAnswer, line, errdefs.ErrInvalidArgument)
}
