// SPDX-License-Identifier: Apache-2.0

package hypervisor

import (
	"context"
	"encoding/json"
	"fmt"

	"github.com/containerd/errdefs"

	"github.com/cloister-project/cloister/tee/abi"
)

// Driver starts VMs with one VMM, for guests of one architecture. A factory makes it without touching the host (package
// hypervisor/vmm); the VMM's binary is found and asked what it can do when a method with a context first needs it, once. All
// methods may be called from any goroutine.
//
// Errors of the methods with a context, beside their own: what is wrong with the binary, with the configuration's key
// (hypervisor.path) named; errdefs.ErrNotFound where there is none.
type Driver interface {
	// Kind is the VMM's name as the configuration has it (hypervisor.kind).
	Kind() string
	// VsockKinds returns what can carry the guest's vsock, at least one.
	VsockKinds() []VsockKind
	// Grows reports whether a document can have Memory.MaxBytes.
	Grows() bool
	// DefaultCPU returns the CPU model of VMs for which nobody names another; empty where the VMM has no models. A
	// confidential VM's platform may name its own.
	DefaultCPU(Accelerator) string
	// KernelParameters returns what the guest's kernel needs to run well on the VMM's machine. The caller adds its own
	// behind them.
	KernelParameters(Accelerator) []string
	// Validate checks everything about a document that can be told without touching the host: Document.Validate, and what
	// this VMM's machine has no room for or does not know. The error is errdefs.ErrInvalidArgument and names every fault.
	Validate(Document) error

	// Binary looks for the binary, without running it, and returns its path.
	Binary() (string, error)
	// Capabilities returns what the binary can do.
	Capabilities(context.Context) (Capabilities, error)
	// Accelerator turns "auto" (or ""), "kvm" or "tcg" into what this host and the binary can do. auto is KVM only where
	// /dev/kvm opens and the CPU has hardware virtualization. An accelerator that is asked for by name and not there is an
	// error, never replaced.
	Accelerator(ctx context.Context, want string) (Accelerator, error)
	// Describe returns how Start would run the VMM for a document, as a person may look at it. Nothing is started and no
	// file that the document names is opened.
	Describe(context.Context, Document) (Invocation, error)
	// Start starts the VMM for the document, with the virtual CPUs stopped until VM.Boot. ctx bounds the start only. It
	// takes over the files in Resources, also on errors. On an error nothing is left, no log either: the error quotes the
	// VMM's own words, as an Exit in its chain where the VMM ended by itself.
	//
	// errdefs.ErrInvalidArgument: the document, with all its faults. errdefs.ErrNotImplemented: the binary lacks something.
	// errdefs.ErrResourceExhausted: more memory than the host has.
	Start(context.Context, Document, Resources) (VM, error)
}

// TableMaker is a Driver that can get the ACPI tables of a document's VM as its firmware would get them, by starting the
// machine under emulation up to that moment: TDX measures them (RTMR0).
type TableMaker interface {
	// ACPITables returns the tables, and in a few words how they were made. Nothing of the VM is confidential or runs
	// further. A firmware that takes no tables is waited for until ctx ends.
	ACPITables(context.Context, Document) (ACPITables, string, error)
}

// Capabilities is what a VMM's binary can do, as far as others than its driver must know.
type Capabilities struct {
	// Binary is the path, Version what the binary says of itself, Details are further words; all for people.
	Binary  string   `json:"binary"`
	Version string   `json:"version"`
	Details []string `json:"details,omitempty"`
	// Sandbox says what a sandboxed document (Document.Sandboxed) lacks here; empty: nothing.
	Sandbox string `json:"sandbox,omitempty"`
	// Platforms has, for each confidential platform with hardware behind it that the VMM knows to launch, what this binary
	// lacks for it; empty: nothing.
	Platforms map[abi.Platform]string `json:"platforms,omitempty"`
}

// Launches returns nil if the binary can launch VMs of a platform with hardware behind it, else an error that says what
// it lacks.
func (c Capabilities) Launches(p abi.Platform) error {
	lacks, known := c.Platforms[p]
	switch {
	case !known:
		return fmt.Errorf("this VMM does not launch VMs of platform %q: %w", p, errdefs.ErrNotImplemented)
	case lacks != "":
		return fmt.Errorf("%s: %w", lacks, errdefs.ErrNotImplemented)
	}
	return nil
}

// Invocation is how a VMM is run for a document.
type Invocation struct {
	Binary string   `json:"binary"`
	Args   []string `json:"args"`
	// Files are inherited by the VMM, beside the standard ones.
	Files []InheritedFile `json:"files,omitempty"`
	// Requests are sent over the VMM's API socket, in order, where the VMM is driven by one.
	Requests []Request `json:"requests,omitempty"`
}

// InheritedFile is an open file that the VMM is started with.
type InheritedFile struct {
	FD int `json:"fd"`
	// Name is the driver's own, What says for people what is behind it.
	Name string `json:"name"`
	What string `json:"what"`
}

// Request is one call of a VMM's API.
type Request struct {
	Method string          `json:"method"`
	Path   string          `json:"path"`
	Body   json.RawMessage `json:"body,omitempty"`
}
