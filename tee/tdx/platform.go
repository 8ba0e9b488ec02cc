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

// Prepare adds TDX to a document: firmware, attributes and the fields that bind the launch. All refusals are one error.
func (p *Platform) Prepare(_ context.Context, doc *hypervisor.Document, in tee.Inputs) error {
	faults := documentFaults(doc)
	fw, err := p.firmware()
	switch {
	case err != nil:
		faults = append(faults, err)
	case doc.Architecture == hypervisor.ArchAMD64:
		if _, err := handOff(fw.parsed.TDX, doc.Memory.Bytes); err != nil {
			faults = append(faults, err)
		}
	}
	if len(faults) > 0 {
		return refused(faults)
	}
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
	doc.Boot.Firmware = fw.path
	doc.Confidential = &hypervisor.Confidential{Platform: string(tee.TDX), TDX: &c}
	return nil
}

// documentFaults are what a TD cannot be or must not be.
func documentFaults(doc *hypervisor.Document) (faults []error) {
	add := func(format string, args ...any) { faults = append(faults, fmt.Errorf(format, args...)) }
	if doc.Architecture != hypervisor.ArchAMD64 {
		add("TDX is of %s, this VM is %s", hypervisor.ArchAMD64, doc.Architecture)
	}
	if model, _, _ := strings.Cut(doc.CPU.Model, ","); model != "host" {
		add("CPU model %q: QEMU starts TDs with the model \"host\" only (hypervisor.cpu_model); the TDX module, not the model, decides what the guest sees", doc.CPU.Model)
	}
	if doc.CPU.Count < 1 {
		add("%d virtual CPUs", doc.CPU.Count)
	}
	if doc.Boot.Sealed {
		add("the boot image is sealed for another platform")
	}
	if doc.Boot.Kernel == "" {
		add("no kernel is given: a guest without one would boot what a disk holds")
	}
	if doc.SharedFolderPorts != 0 {
		add("%d ports for shared folders: a TD takes no host folders", doc.SharedFolderPorts)
	}
	if c := doc.Confidential; c != nil && (c.SNP != nil || c.SecureExecution || c.Platform != string(tee.TDX) && c.Platform != "") {
		add("the VM is one of platform %q already", c.Platform)
	}
	return faults
}

// image is a firmware image that was read.
type image struct {
	path, digest string
	raw          []byte
	parsed       *firmware.Image
}

// firmware finds, reads and judges the configured image. One that is fit but not accepted is given with the error.
func (p *Platform) firmware() (*image, error) {
	path := p.cfg.Firmware
	if path == "" {
		dirs := p.cfg.Descriptors
		if len(dirs) == 0 {
			dirs = firmware.DescriptorDirs()
		}
		var err error
		if path, err = firmware.Find(dirs, firmware.FeatureTDX); err != nil {
			return nil, fmt.Errorf("no firmware is configured and none was found: %w", err)
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
	return fw, firmwareError(fmt.Sprintf("the firmware %s has the SHA-256 digest %s and %s: if you trust that image with your guests, add its digest to "+
		"tee.tdx.firmware_digests; else %s", path, fw.digest, what, fixFirmware))
}

// firmwareError is errdefs.ErrInvalidArgument.
type firmwareError string

func (e firmwareError) Error() string { return string(e) }

// Is makes it an errdefs.ErrInvalidArgument.
func (firmwareError) Is(target error) bool { return target == errdefs.ErrInvalidArgument }

// readImage reads an image that a TD can start with, accepted or not.
func readImage(path string) (*image, error) {
	raw, digest, err := firmware.ReadFile(path, firmware.MaxSize)
	if errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("the firmware %s is not there (%w)", path, errdefs.ErrNotFound)
	} else if err != nil {
		return nil, fmt.Errorf("the firmware cannot be read: %w", err)
	}
	parsed, err := firmware.Parse(raw)
	if err != nil {
		return nil, fmt.Errorf("the firmware %s: %w", path, err)
	}
	if err := tdxSections(parsed); err != nil {
		return nil, fmt.Errorf("the firmware %s: %w", path, err)
	}
	return &image{path: path, digest: digest, raw: raw, parsed: parsed}, nil
}

// tdxSections demands what a VMM demands: code that is measured, and one place for the hand-off block.
func tdxSections(parsed *firmware.Image) error {
	if parsed.TDX == nil {
		return fmt.Errorf("it has no TDX metadata, so that no TD can start with it; take an image built for TDX (OvmfPkg/IntelTdx, or OVMF with TDX support): %w",
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
