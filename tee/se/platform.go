// SPDX-License-Identifier: Apache-2.0

package se

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"

	"github.com/containerd/errdefs"

	"github.com/cloister-project/cloister/hypervisor"
	"github.com/cloister-project/cloister/tee"
	"github.com/cloister-project/cloister/tee/firmware"
	"github.com/cloister-project/cloister/tee/hostprobe"
	"github.com/cloister-project/cloister/tee/se/image"
)

// Config of the platform.
type Config struct {
	// Image is the absolute path of the Secure Execution image.
	Image string
	// AllowDebug accepts an image whose guest the host may take dumps of.
	AllowDebug bool
}

// Platform is IBM Secure Execution. It holds configuration only; all methods may be called from any goroutine.
type Platform struct {
	cfg  Config
	host hostprobe.Host
}

var _ tee.Platform = (*Platform)(nil)

// New checks the configuration, not the files in it. errdefs.ErrInvalidArgument.
func New(cfg Config) (*Platform, error) {
	switch {
	case cfg.Image == "":
		return nil, fmt.Errorf("SE: no image is configured; make one with `cloister image se build` and name it in tee.se.image: %w", errdefs.ErrInvalidArgument)
	case !filepath.IsAbs(cfg.Image):
		return nil, fmt.Errorf("SE: the path of the image, %q, is not absolute: %w", cfg.Image, errdefs.ErrInvalidArgument)
	}
	return &Platform{cfg: cfg}, nil
}

// Name of the platform.
func (p *Platform) Name() tee.Name { return tee.SE }

// Prepare makes the document one that boots the image: whatever initrd and parameters stood there are in the image, or
// they are not used. All refusals are one error.
//
// in.InitdataDigest is not looked at: the binding is sealed in the image, and the agent enforces it (see the package).
func (p *Platform) Prepare(_ context.Context, doc *hypervisor.Document, _ tee.Inputs) error {
	faults := documentFaults(doc)
	info, err := p.inspect()
	switch {
	case err != nil:
		faults = append(faults, err)
	case uint64(info.Size) > doc.Memory.Bytes:
		faults = append(faults, fmt.Errorf("the image has %d bytes, the VM's memory %d", info.Size, doc.Memory.Bytes))
	}
	if faults != nil {
		return fmt.Errorf("SE: %w (%w)", errors.Join(faults...), errdefs.ErrInvalidArgument)
	}
	doc.Boot = hypervisor.Boot{Kernel: p.cfg.Image, Sealed: true}
	doc.Confidential = &hypervisor.Confidential{Platform: string(tee.SE), SecureExecution: true}
	return nil
}

// documentFaults are what a Secure Execution guest cannot be or must not have.
func documentFaults(doc *hypervisor.Document) (faults []error) {
	add := func(format string, a ...any) { faults = append(faults, fmt.Errorf(format, a...)) }
	if doc.Architecture != hypervisor.ArchS390X {
		add("it is of %s, this VM is %q", hypervisor.ArchS390X, doc.Architecture)
	}
	if doc.Boot.Firmware != "" {
		add("a firmware (%s) has no place in it: the guest starts with the image", doc.Boot.Firmware)
	}
	if doc.SharedFolderPorts != 0 {
		add("%d ports for shared folders: it takes no host folders", doc.SharedFolderPorts)
	}
	if c := doc.Confidential; c != nil && (c.SNP != nil || c.TDX != nil || c.Platform != string(tee.SE) && c.Platform != "") {
		add("the VM is one of platform %q already", c.Platform)
	}
	return faults
}

// inspect reads the image's header and refuses what would weaken the guest.
func (p *Platform) inspect() (*image.Info, error) {
	info, err := image.InspectFile(p.cfg.Image)
	switch {
	case err != nil:
		return nil, fmt.Errorf("the image cannot be used: %w", err)
	case info.PCF&image.NoComponentEncryption != 0:
		return nil, fmt.Errorf("%s: kernel, initrd and command line are not encrypted, initdata's digest neither: %w", p.cfg.Image, errdefs.ErrInvalidArgument)
	case info.PCF&image.AllowDump != 0 && !p.cfg.AllowDebug:
		return nil, fmt.Errorf("%s allows the host to take dumps of the guest; that is accepted only where debugging is allowed (tee.allow_debug): %w", p.cfg.Image, errdefs.ErrInvalidArgument)
	}
	return info, nil
}

// Measure gives what names the image. Nothing of it depends on the VM's size or CPU.
func (p *Platform) Measure(_ context.Context, doc hypervisor.Document) (*tee.ReferenceValues, error) {
	if c := doc.Confidential; c == nil || !c.SecureExecution || doc.Boot.Kernel != p.cfg.Image {
		return nil, fmt.Errorf("SE: the document was not prepared for %s: %w", p.cfg.Image, errdefs.ErrInvalidArgument)
	}
	info, err := p.inspect()
	if err != nil {
		return nil, fmt.Errorf("SE: %w", err)
	}
	digest, err := firmware.DigestFile(p.cfg.Image, image.MaxSize)
	if err != nil {
		return nil, fmt.Errorf("SE: %w", err)
	}
	values := []tee.Value{
		{Name: "se.tag", Hex: info.Tag.String(), Note: "names the image: nothing sealed in it can change without it"},
		{Name: "se.pld", Hex: info.PLD.String(), Note: "digest of the encrypted pages"},
		{Name: "se.ald", Hex: info.ALD.String(), Note: "digest of the pages' addresses"},
		{Name: "se.tld", Hex: info.TLD.String(), Note: "digest of the pages' tweaks"},
	}
	for _, h := range info.HostKeyHashes {
		values = append(values, tee.Value{Name: "se.image_phkh", Hex: h.String(), Note: "evidence shows one of these: the machine that opened the image"})
	}
	return &tee.ReferenceValues{
		Platform: tee.SE,
		VCPUs:    doc.CPU.Count,
		CPUModel: doc.CPU.Model,
		Values:   values,
		Inputs:   []tee.Input{{Role: "image", Path: p.cfg.Image, SHA256: digest}},
	}, nil
}
