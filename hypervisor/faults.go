// SPDX-License-Identifier: Apache-2.0

package hypervisor

import (
	"errors"
	"fmt"

	"github.com/containerd/errdefs"
)

// Faults collects everything wrong with a document. Drivers add what their VMM has no room for to what Document.Validate
// finds.
type Faults []error

// Add adds a fault; the format is fmt.Errorf's.
func (f *Faults) Add(format string, a ...any) { *f = append(*f, fmt.Errorf(format, a...)) }

// Err returns all faults as one errdefs.ErrInvalidArgument; nil if there is none.
func (f Faults) Err() error {
	if len(f) == 0 {
		return nil
	}
	return fmt.Errorf("the VM's description is not valid: %w (%w)", errors.Join(f...), errdefs.ErrInvalidArgument)
}
