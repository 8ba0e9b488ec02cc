// SPDX-License-Identifier: Apache-2.0

package none

import (
	"context"
	"strings"

	"github.com/cloister-project/cloister/agent-protocol/wire"
	"github.com/cloister-project/cloister/hypervisor"
	"github.com/cloister-project/cloister/tee"
)

// Platform of ordinary VMs. The zero value is ready for use.
type Platform struct{}

// New returns the platform.
func New() *Platform { return &Platform{} }

var _ tee.Platform = (*Platform)(nil)

// Name is tee.None.
func (*Platform) Name() tee.Name { return tee.None }

// Probe says what an ordinary VM is, so that nobody takes it for more. Nothing is missing for it.
func (*Platform) Probe(context.Context, tee.Host) []tee.Finding {
	return []tee.Finding{{What: "protection", Result: tee.Note, Detail: tee.None.Describe()}}
}

// Files returns none.
func (*Platform) Files() []tee.File { return nil }

// SealedImage returns none.
func (*Platform) SealedImage() string { return "" }

// BootsKernelFile is false: nothing is measured.
func (*Platform) BootsKernelFile() bool { return false }

// CPUModel leaves the choice to the VMM.
func (*Platform) CPUModel() string { return "" }

// MeasuresCPUs is false: nothing is measured.
func (*Platform) MeasuresCPUs() bool { return false }

// HostCanRead is true.
func (*Platform) HostCanRead(hypervisor.Document) bool { return true }

// Explain knows nothing that is an ordinary VM's own.
func (*Platform) Explain(hypervisor.Exit) string { return "" }

// Prepare adds nothing. It refuses what only a confidential launch can keep: errdefs.ErrInvalidArgument, all reasons in one.
func (*Platform) Prepare(_ context.Context, doc *hypervisor.Document, in tee.Inputs) error {
	var faults hypervisor.Faults
	if in.InitdataDigest != nil {
		faults.Add("initdata is given and nothing binds it to the launch of an ordinary VM; " +
			"choose a confidential platform (tee.platform), or take it away")
	}
	if doc.Confidential != nil {
		faults.Add("the VM is one of platform %q already", doc.Confidential.Platform)
	}
	for _, p := range doc.Boot.Parameters {
		if name, _, _ := strings.Cut(p, "="); name == wire.ParamTEE || name == wire.ParamInitdata {
			faults.Add("the kernel parameter %s tells the guest that it is a confidential one", p)
		}
	}
	return faults.Of("ordinary VM")
}

// Measure returns no values: no hardware measures an ordinary VM.
func (*Platform) Measure(_ context.Context, doc hypervisor.Document) (*tee.ReferenceValues, error) {
	return &tee.ReferenceValues{
		Platform: tee.None, VCPUs: doc.CPU.Count, CPUModel: doc.CPU.Model, Parameters: strings.Join(doc.Boot.Parameters, " "),
	}, nil
}
