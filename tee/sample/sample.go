// SPDX-License-Identifier: Apache-2.0

package sample

import (
	"context"
	"encoding/hex"
	"slices"
	"strings"

	"github.com/cloister-project/cloister/agent-protocol/wire"
	"github.com/cloister-project/cloister/hypervisor"
	"github.com/cloister-project/cloister/tee"
	"github.com/cloister-project/cloister/tee/abi"
	"github.com/cloister-project/cloister/tee/initdata"
)

// Config of the platform.
type Config struct {
	// SealedImage is the path of an image in the format of Secure Execution that VMs boot in place of kernel and initrd, for
	// tests of such images without the hardware; empty: none.
	SealedImage string
}

// Platform without protection.
type Platform struct{ cfg Config }

// New returns the platform.
func New(cfg Config) *Platform { return &Platform{cfg} }

var _ tee.Platform = (*Platform)(nil)

// Name is tee.Sample.
func (*Platform) Name() tee.Name { return tee.Sample }

// Files is the sealed image, if there is one.
func (p *Platform) Files() []tee.File {
	return []tee.File{{Key: "tee.se.image", Path: p.cfg.SealedImage, Fix: "build it with `cloister image se build` or correct the key"}}
}

// SealedImage is the configured one.
func (p *Platform) SealedImage() string { return p.cfg.SealedImage }

// BootsKernelFile is false: no firmware measures the file.
func (*Platform) BootsKernelFile() bool { return false }

// CPUModel leaves the choice to the VMM.
func (*Platform) CPUModel() string { return "" }

// MeasuresCPUs is false: nothing is measured.
func (*Platform) MeasuresCPUs() bool { return false }

// HostCanRead is true.
func (*Platform) HostCanRead(hypervisor.Document) bool { return true }

// Explain knows nothing: no hardware refuses.
func (*Platform) Explain(hypervisor.Exit) string { return "" }

// Probe says that nothing is protected. Nothing is missing: every host can run an ordinary VM.
func (*Platform) Probe(context.Context, tee.Host) []tee.Finding {
	return []tee.Finding{{What: "protection", Result: tee.Note, Detail: tee.Sample.Describe()}}
}

// Prepare marks the document as one under a confidential VM's rules, and puts initdata's binding on the command line.
// errdefs.ErrInvalidArgument: what the rules forbid, all reasons in one.
func (*Platform) Prepare(_ context.Context, doc *hypervisor.Document, in tee.Inputs) error {
	prepared := *doc
	prepared.Confidential = &hypervisor.Confidential{Platform: tee.Sample}
	if err := append(documentFaults(doc), prepared.ConfidentialFaults()...).Of("sample VM"); err != nil {
		return err
	}
	if in.InitdataDigest != nil && !doc.Boot.Sealed {
		binding := wire.ParamInitdata + "=" + hex.EncodeToString(initdata.Bind(in.InitdataDigest, abi.BindingSize))
		// The caller's slice may be shared.
		prepared.Boot.Parameters = append(slices.Clone(doc.Boot.Parameters), binding)
	}
	*doc = prepared
	return nil
}

func documentFaults(doc *hypervisor.Document) (faults hypervisor.Faults) {
	add := faults.Add
	if c := doc.Confidential; c != nil && (c.Platform != tee.Sample || c.SNP != nil || c.TDX != nil || c.SecureExecution) {
		add("the VM is one of platform %q already", c.Platform)
	}
	if doc.Boot.Sealed {
		if len(doc.Boot.Parameters) > 0 || doc.Boot.Initrd != "" {
			add("the boot image is sealed, an initrd or kernel parameters beside it would not count")
		}
		return faults
	}
	named := 0
	for _, p := range doc.Boot.Parameters {
		switch name, value, _ := strings.Cut(p, "="); name {
		case wire.ParamTEE:
			named++
			if value != string(tee.Sample) {
				add("the kernel parameter %s names another platform", p)
			}
		case wire.ParamInitdata:
			add("the kernel parameter %s is the launch's to set", p)
		}
	}
	if named != 1 {
		add("the kernel parameter %s is given %d times, want once: the guest would not know what it is", wire.ParamTEE, named)
	}
	return faults
}

// Measure returns no values: there is no hardware that would report any.
func (*Platform) Measure(_ context.Context, doc hypervisor.Document) (*tee.ReferenceValues, error) {
	return &tee.ReferenceValues{
		Platform: tee.Sample, VCPUs: doc.CPU.Count, CPUModel: doc.CPU.Model, Parameters: strings.Join(doc.Boot.Parameters, " "),
	}, nil
}
