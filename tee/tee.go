// SPDX-License-Identifier: Apache-2.0

package tee

import (
	"context"
	"fmt"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/cloister-project/cloister/hypervisor"
	"github.com/cloister-project/cloister/tee/abi"
)

// Name is a platform's name.
type Name = abi.Platform

// Platforms, as package abi has them.
const (
	None   = abi.None
	Sample = abi.Sample
	SNP    = abi.SNP
	TDX    = abi.TDX
	SE     = abi.SE
)

// Names returns all platforms.
func Names() []Name { return abi.Platforms() }

// Host is what a caller of Probe found out about the node already.
type Host struct {
	Accelerator hypervisor.Accelerator
	// VMM is what the VMM's binary can do; nil: none was found, or it could not be asked.
	VMM *hypervisor.Capabilities
}

// Result of one look at the host.
type Result string

// Results.
const (
	OK      Result = "ok"
	Missing Result = "missing" // the platform does not work without it
	Note    Result = "note"
)

// Finding is what Probe saw of one thing that a platform needs.
type Finding struct {
	What   string `json:"what"`
	Result Result `json:"result"`
	Detail string `json:"detail"`
	// Fix tells what to do; set with Missing.
	Fix string `json:"fix,omitempty"`
}

// Inputs of Prepare, beside the document.
type Inputs struct {
	// InitdataDigest is initdata's digest in its own algorithm, to be bound to the launch; nil: no initdata.
	InitdataDigest []byte
}

// File is a file that a platform reads.
type File struct {
	// Key of the configuration that names it.
	Key, Path string
	// Fix says what to do if it cannot be read.
	Fix string
}

// Platform is one way of launching a VM. Implementations hold configuration only; all methods may be called from any
// goroutine.
type Platform interface {
	Name() Name
	// Files lists the files that the configuration names for the platform, beside kernel and initrd. A path may be empty.
	Files() []File
	// SealedImage returns the path of the image that VMs boot in place of kernel and initrd, which it holds both; empty:
	// they boot these.
	SealedImage() string
	// BootsKernelFile reports whether VMs start the configured kernel file as it is, since its bytes are what is measured.
	// Otherwise a VMM may start what was unpacked from it.
	BootsKernelFile() bool
	// CPUModel returns the CPU model of VMs for which the configuration names none; empty: the VMM's own.
	CPUModel() string
	// MeasuresCPUs reports whether what Measure predicts depends on the number of virtual CPUs.
	MeasuresCPUs() bool
	// HostCanRead reports whether a prepared document lets the host read the guest, by design or by a debug launch.
	HostCanRead(doc hypervisor.Document) bool
	// Explain finds in a VM's end why it could not be launched on the platform, and says it with what to do; empty: nothing
	// there tells. The words are the host's and the guest's to write: they explain, they prove nothing.
	Explain(exit hypervisor.Exit) string
	// Probe looks for everything that the platform needs on this host, in the order in which it is set up. It changes
	// nothing and needs no VM.
	Probe(ctx context.Context, h Host) []Finding
	// Prepare adds the platform to a document whose size, CPU model, boot files, parameters and devices stand. It reads
	// files that the configuration and the document name (firmware, keys, boot files), looks at no hardware but the facts
	// that do not change the measurement, and gives on every machine the same measured values for the same input. What
	// would weaken the platform is an error: errdefs.ErrInvalidArgument, all reasons in one.
	Prepare(ctx context.Context, doc *hypervisor.Document, in Inputs) error
	// Measure predicts what the hardware will report of a prepared document. None and Sample give no values, SE those of
	// its image.
	Measure(ctx context.Context, doc hypervisor.Document) (*ReferenceValues, error)
}

// ReferenceValues are what a verifier compares evidence with.
type ReferenceValues struct {
	Platform Name   `json:"platform"`
	VCPUs    int    `json:"vcpus"`
	CPUModel string `json:"cpu_model,omitempty"`
	// Values in the order in which a person looks for them.
	Values []Value `json:"values"`
	// Unpredicted are those that the hardware will report and that cannot be predicted. They are not among the values: what
	// has no value cannot be compared with.
	Unpredicted []Unpredicted `json:"unpredicted,omitempty"`
	// Inputs are the files that were measured.
	Inputs []Input `json:"inputs,omitempty"`
	// Parameters is the measured kernel command line.
	Parameters string `json:"parameters,omitempty"`
}

// Value is one measured register or field.
type Value struct {
	// Name: snp.launch_digest, snp.host_data, snp.policy, snp.id_key_digest, snp.author_key_digest, tdx.mrtd,
	// tdx.mrtd_two_pass, tdx.rtmr0, tdx.rtmr1, tdx.rtmr2, tdx.mrconfigid, tdx.attributes, se.tag, se.image_phkh,
	// se.attestation_phkh, se.pld, se.ald, se.tld.
	Name string `json:"name"`
	// Hex is the value's bytes in lower-case hexadecimal digits, in the order in which the evidence has them; numbers are
	// little-endian there (SEV-SNP's POLICY, TDX's ATTRIBUTES).
	Hex string `json:"hex"`
	// Note says what has to be known about the value; for people.
	Note string `json:"note,omitempty"`
}

// Unpredicted is a register whose value is not known before the launch.
type Unpredicted struct {
	Name string `json:"name"`
	// Reason says why, and what it would take; for people.
	Reason string `json:"reason"`
}

// Input is a measured file.
type Input struct {
	// Role: firmware, kernel, initrd, image.
	Role   string `json:"role"`
	Path   string `json:"path"`
	SHA256 string `json:"sha256"`
}

// UnsupportedError says what a host lacks for a platform. It is errdefs.ErrFailedPrecondition.
type UnsupportedError struct {
	Platform Name
	Missing  []Finding
}

// Error names everything that is missing and what to do about it.
func (e *UnsupportedError) Error() string {
	var b strings.Builder
	fmt.Fprintf(&b, "this host cannot launch %s VMs:", e.Platform)
	for _, f := range e.Missing {
		fmt.Fprintf(&b, "\n  - %s: %s; %s", f.What, f.Detail, f.Fix)
	}
	return b.String()
}

// Is makes it an errdefs.ErrFailedPrecondition.
func (e *UnsupportedError) Is(target error) bool { return target == errdefs.ErrFailedPrecondition }

// Supported is nil, or an *UnsupportedError with the findings that are missing.
func Supported(name Name, findings []Finding) error {
	var missing []Finding
	for _, f := range findings {
		if f.Result == Missing {
			missing = append(missing, f)
		}
	}
	if len(missing) == 0 {
		return nil
	}
	return &UnsupportedError{Platform: name, Missing: missing}
}

// ProbeVMM is the finding about the VMM that every platform with hardware behind it needs.
func (h Host) ProbeVMM(name Name) Finding {
	const what = "VMM"
	if h.VMM == nil {
		return Finding{What: what, Result: Missing, Detail: "none was found that can be asked", Fix: "install one, or set hypervisor.path"}
	}
	version := fmt.Sprintf("%s, %s", h.VMM.Binary, h.VMM.Version)
	if err := h.VMM.Launches(name); err != nil {
		return Finding{What: what, Result: Missing, Detail: fmt.Sprintf("%s: %v", version, err),
			Fix: "install one that launches VMs of platform " + string(name) + ", or set hypervisor.path"}
	}
	return Finding{What: what, Result: OK, Detail: version + ", launches VMs of platform " + string(name)}
}
