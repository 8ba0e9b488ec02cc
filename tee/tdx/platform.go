// SPDX-License-Identifier: Apache-2.0

package tdx

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/cloister-project/cloister/hypervisor"
	"github.com/cloister-project/cloister/tee"
	"github.com/cloister-project/cloister/tee/abi"
	"github.com/cloister-project/cloister/tee/firmware"
	"github.com/cloister-project/cloister/tee/initdata"
)

var _ tee.Platform = (*Platform)(nil)

// Name of the platform.
func (p *Platform) Name() tee.Name { return tee.TDX }

// Files is the firmware.
func (p *Platform) Files() []tee.File {
	return []tee.File{{Key: "tee.tdx.firmware", Path: p.cfg.Firmware,
		Fix: "install a firmware image built for TDX, or set the key to \"\" to have it found"}}
}

// SealedImage returns none.
func (*Platform) SealedImage() string { return "" }

// BootsKernelFile is true: the firmware measures the file.
func (*Platform) BootsKernelFile() bool { return true }

// CPUModel leaves the choice to the VMM, which with KVM is the host's: QEMU starts TDs with no other.
func (*Platform) CPUModel() string { return "" }

// MeasuresCPUs is true: the ACPI tables list them.
func (*Platform) MeasuresCPUs() bool { return true }

// HostCanRead reports whether the TD is one for debugging.
func (*Platform) HostCanRead(doc hypervisor.Document) bool {
	c := doc.Confidential
	return c != nil && c.TDX != nil && c.TDX.Attributes&AttributeDebug != 0
}

// Explain knows the words of QEMU (accel/kvm, target/i386/kvm).
func (*Platform) Explain(exit hypervisor.Exit) string {
	return tee.Advise(exit.VMMLog,
		tee.Advice{Said: "vm-type TDX not supported by KVM", Do: "KVM on this host runs no TDX guests; `cloister check --tee tdx` tells what " +
			"is missing"},
		tee.NoPrivateMemory,
	)
}

// Prepare adds TDX to a document: firmware, attributes and the fields that bind the launch. All refusals are one error.
func (p *Platform) Prepare(_ context.Context, doc *hypervisor.Document, in tee.Inputs) error {
	c := hypervisor.TDX{
		Attributes:    p.cfg.Attributes,
		MROwner:       slices.Clone(p.mrOwner),
		MROwnerConfig: slices.Clone(p.mrOwnerConfig),
	}
	if in.InitdataDigest != nil {
		c.MRConfigID = initdata.Bind(in.InitdataDigest, abi.TDXDigestSize)
	}
	if p.quoteSocket != nil {
		q := *p.quoteSocket
		c.QuoteSocket = &q
	}
	prepared := *doc
	prepared.Boot.Firmware = "-" // that it is missing has an error of its own
	prepared.Confidential = &hypervisor.Confidential{Platform: tee.TDX, TDX: &c}
	faults := documentFaults(doc, prepared)
	fw, err := p.firmware()
	switch {
	case err != nil:
		faults = append(faults, err)
	case doc.Arch() == hypervisor.ArchAMD64:
		prepared.Boot.Firmware = fw.path
		if _, err := handOff(fw.parsed.TDX, doc.Memory.Bytes); err != nil {
			faults = append(faults, err)
		}
	}
	if err := faults.Of("TDX"); err != nil {
		return err
	}
	*doc = prepared
	return nil
}

// documentFaults are what a TD cannot be or must not be, beside what holds for every VMM.
func documentFaults(doc *hypervisor.Document, prepared hypervisor.Document) hypervisor.Faults {
	faults := prepared.ConfidentialFaults()
	if model, _, _ := strings.Cut(doc.CPU.Model, ","); model != "host" {
		faults.Add("CPU model %q: QEMU starts TDs with the model \"host\" only (hypervisor.cpu_model); the TDX module, not the model, decides "+
			"what the guest sees", doc.CPU.Model)
	}
	if doc.CPU.Count < 1 {
		faults.Add("%d virtual CPUs", doc.CPU.Count)
	}
	if c := doc.Confidential; c != nil && c.Platform != tee.TDX {
		faults.Add("the VM is one of platform %q already", c.Platform)
	}
	return faults
}

// image is a firmware image that was read.
type image struct {
	path, digest string
	raw          []byte
	parsed       *firmware.Image
}

// firmware finds, reads and judges the configured image. One that is fit but not accepted is returned with the error, a
// *firmware.Error.
func (p *Platform) firmware() (*image, error) {
	path := p.cfg.Firmware
	if path == "" {
		dirs := p.cfg.Descriptors
		if len(dirs) == 0 {
			dirs = firmware.DescriptorDirs()
		}
		var err error
		if path, err = firmware.Find(dirs, firmware.FeatureTDX); err != nil {
			return nil, &firmware.Error{Err: fmt.Errorf("no firmware is configured and none was found: %w", err), Fix: fixFirmware}
		}
	}
	fw, err := readImage(path)
	if err != nil {
		return nil, err
	}
	if slices.Contains(p.cfg.Digests, fw.digest) {
		return fw, nil
	}
	what := "is not on the list of accepted firmware"
	if len(p.cfg.Digests) == 0 {
		what = "cannot be accepted, the list of accepted firmware is empty"
	}
	return fw, &firmware.Error{
		Err: fmt.Errorf("the firmware %s has the SHA-256 digest %s and %s: %w", path, fw.digest, what, errdefs.ErrInvalidArgument),
		Fix: "if you trust that image with your guests, add its digest to tee.tdx.firmware_digests; else " + fixFirmware,
	}
}

// readImage reads an image that a TD can start with, accepted or not. The error is a *firmware.Error.
func readImage(path string) (*image, error) {
	raw, digest, err := firmware.ReadFile(path, firmware.MaxSize)
	if errors.Is(err, os.ErrNotExist) {
		return nil, &firmware.Error{Err: fmt.Errorf("the firmware %s is not there: %w", path, errdefs.ErrNotFound), Fix: fixFirmware}
	} else if err != nil {
		return nil, &firmware.Error{Err: fmt.Errorf("the firmware cannot be read: %w", err),
			Fix: "make the file readable, or correct tee.tdx.firmware"}
	}
	parsed, err := firmware.Parse(raw, firmware.FeatureTDX)
	if err != nil {
		return nil, &firmware.Error{Err: fmt.Errorf("the firmware %s: %w", path, err), Fix: firmware.FixDamaged}
	}
	if err := tdxSections(parsed); err != nil {
		return nil, &firmware.Error{Err: fmt.Errorf("the firmware %s: %w", path, err), Fix: fixFirmware}
	}
	return &image{path: path, digest: digest, raw: raw, parsed: parsed}, nil
}

// tdxSections demands what a VMM demands: code that is measured, and one place for the hand-off block.
func tdxSections(parsed *firmware.Image) error {
	if parsed.TDX == nil {
		return fmt.Errorf("it has no TDX metadata, so that no TD can start with it; take an image built for TDX (OvmfPkg/IntelTdx, or OVMF "+
			"with TDX support): %w",
			errdefs.ErrInvalidArgument)
	}
	code, handOffs := 0, 0
	for _, s := range parsed.TDX {
		switch {
		case s.Type == firmware.TDXBootFirmware && s.Attributes&firmware.TDXExtend == 0:
			return fmt.Errorf("its code at %#x is not measured: %w", s.MemAddress, errdefs.ErrInvalidArgument)
		case s.Type == firmware.TDXBootFirmware:
			code++
		case s.Type == firmware.TDXHandOff:
			handOffs++
		}
	}
	if code == 0 || handOffs != 1 {
		return fmt.Errorf("its TDX metadata has %d sections of code and %d for the hand-off block, want at least one and exactly one: %w",
			code, handOffs, errdefs.ErrInvalidArgument)
	}
	return nil
}
