// SPDX-License-Identifier: Apache-2.0

package refusal

import (
	"errors"
	"fmt"
	"strings"

	"github.com/containerd/errdefs"
)

// Error lists what cannot be had in a VM, each with its reason. It is an errdefs.ErrInvalidArgument.
type Error struct {
	Reasons []string
}

// Error names all reasons in one line: `kubectl get events` shows no second one.
func (e *Error) Error() string {
	if len(e.Reasons) == 1 {
		return "not in a VM: " + e.Reasons[0]
	}
	var all strings.Builder
	fmt.Fprintf(&all, "not in a VM, for %d reasons:", len(e.Reasons))
	for i, reason := range e.Reasons {
		fmt.Fprintf(&all, " (%d) %s", i+1, reason)
	}
	return all.String()
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
