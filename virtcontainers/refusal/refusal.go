// SPDX-License-Identifier: Apache-2.0

package refusal

import (
	"errors"
	"strings"

	"github.com/containerd/errdefs"
)

// Error lists what cannot be had in a VM, each with its reason. It is an errdefs.ErrInvalidArgument.
type Error struct {
	Reasons []string
}

// Error names all reasons.
func (e *Error) Error() string {
	return "this asks for what a VM cannot give:\n  - " + strings.Join(e.Reasons, "\n  - ")
}

// Unwrap returns the error's kind.
func (e *Error) Unwrap() error { return errdefs.ErrInvalidArgument }

// Of returns the Error with these reasons, nil if there are none.
func Of(reasons []string) error {
	if len(reasons) == 0 {
		return nil
	}
	return &Error{Reasons: reasons}
}

// Reasons takes the reasons out of an Error. Any other error is returned.
func Reasons(err error) ([]string, error) {
	var refused *Error
	if errors.As(err, &refused) {
		return refused.Reasons, nil
	}
	return nil, err
}
