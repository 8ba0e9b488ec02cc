// SPDX-License-Identifier: Apache-2.0

package container

import (
	"fmt"

	"github.com/containerd/errdefs"
)

// kindError gives an error a kind of errdefs without changing its text: clients of containerd know runc's words, such
// as `exec: "x": executable file not found in $PATH`, and those must stay at the end of the message.
type kindError struct{ err, kind error }

func (e *kindError) Error() string   { return e.err.Error() }
func (e *kindError) Unwrap() []error { return []error{e.err, e.kind} }

func withKind(err, kind error) error { return &kindError{err, kind} }

// errProcessFinished has the words of runc.
func errProcessFinished() error {
	return withKind(fmt.Errorf("process already finished"), errdefs.ErrNotFound)
}

// errStopped says that a container which must run for what was asked has stopped.
func errStopped() error { return fmt.Errorf("it has stopped: %w", errdefs.ErrFailedPrecondition) }

func errShutsDown() error { return fmt.Errorf("the guest shuts down: %w", errdefs.ErrUnavailable) }

// refused says that a request asks for something that the guest does not do.
func refused(format string, args ...any) error {
	return fmt.Errorf("%s: %w", fmt.Sprintf(format, args...), errdefs.ErrInvalidArgument)
}
