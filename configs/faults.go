// SPDX-License-Identifier: Apache-2.0

package configs

import (
	"fmt"
	"strings"

	"github.com/containerd/errdefs"
)

// Fault is one thing that is wrong in the configuration.
type Fault struct {
	// File is the path of the file, or what stands for it: "built-in defaults", "containerd's runtime options",
	// "pod annotations".
	File string
	// Line counts from 1; 0 where it is not known.
	Line int
	// Key is the dotted key ("sizing.max_vcpus"), or the annotation's key; empty where the whole file is at fault.
	Key string
	// Reason says what was found.
	Reason string
	// Fix says what to do.
	Fix string
}

func (f Fault) String() string {
	var b strings.Builder
	b.WriteString(f.File)
	if f.Line > 0 {
		fmt.Fprintf(&b, ":%d", f.Line)
	}
	if f.Key != "" {
		b.WriteString(": " + f.Key)
	}
	b.WriteString(": " + f.Reason)
	if f.Fix != "" {
		b.WriteString("; " + f.Fix)
	}
	return b.String()
}

// Faults is the error that holds everything wrong in a configuration. It is an errdefs.ErrInvalidArgument.
type Faults []Fault

// Error returns one line a fault, under a head line where there are several.
func (fs Faults) Error() string {
	if len(fs) == 1 {
		return "configuration: " + fs[0].String()
	}
	lines := make([]string, 0, len(fs)+1)
	lines = append(lines, fmt.Sprintf("configuration: %d faults:", len(fs)))
	for _, f := range fs {
		lines = append(lines, "  "+f.String())
	}
	return strings.Join(lines, "\n")
}

// Unwrap makes errdefs.IsInvalidArgument true.
func (fs Faults) Unwrap() error { return errdefs.ErrInvalidArgument }

// err is nil for no faults: a nil Faults in an error interface would not be nil.
func (fs Faults) err() error {
	if len(fs) == 0 {
		return nil
	}
	return fs
}
