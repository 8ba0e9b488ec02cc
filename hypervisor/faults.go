// SPDX-License-Identifier: Apache-2.0

package hypervisor

import (
	"fmt"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
)

// Faults collects everything wrong with a document. Drivers add what their VMM has no room for to what Document.Validate
// finds.
type Faults []error

// Add adds a fault; the format is fmt.Errorf's.
func (f *Faults) Add(format string, a ...any) { *f = append(*f, fmt.Errorf(format, a...)) }

// Err returns all faults as one errdefs.ErrInvalidArgument; nil if there is none.
func (f Faults) Err() error { return f.Of("the VM's description is not valid") }

// Of is Err for something else than a document, which the text begins with.
func (f Faults) Of(what string) error {
	if len(f) == 0 {
		return nil
	}
	return &invalidError{what, f}
}

// invalidError is several faults in one. Each keeps its own kind and causes for errors.Is and errors.As. The text has no
// word on the kind: every fault in the list would end in the same one, and the list in it once more.
type invalidError struct {
	what   string
	faults Faults
}

func (e *invalidError) Error() string {
	lines := make([]string, 0, len(e.faults))
	for _, fault := range e.faults {
		lines = append(lines, strings.TrimSuffix(fault.Error(), ": "+errdefs.ErrInvalidArgument.Error()))
	}
	return e.what + ": " + strings.Join(lines, "\n")
}

func (e *invalidError) Unwrap() []error {
	return append(slices.Clone(e.faults), errdefs.ErrInvalidArgument)
}
