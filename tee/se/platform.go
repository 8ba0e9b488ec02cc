// SPDX-License-Identifier: Apache-2.0

package se

import (
	"context"
	"fmt"
	"strings"

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
	// CPUModel is hypervisor.cpu_model; empty: the VMM's own. Vsock is the transport that the configuration names; empty: it
	// leaves the choice.
	CPUModel string
	Vsock    hypervisor.VsockKind
	// AllowDebug accepts an image whose guest the host may take dumps of.
	AllowDebug bool
}

// Platform is IBM Secure Execution. It holds configuration only; all methods may be called from any goroutine.
type Platform struct {
	cfg  Config
	host hostprobe.Host
}

var _ tee.Platform = (*Platform)(nil)

// New checks the configuration, not the files in it; all its faults are one error, a tee.Faults.
func New(cfg Config) (*Platform, error) {
	p := &Platform{cfg: cfg}
	var faults tee.Faults
	faults.CheckPaths(p.Files(), nil)
	if cfg.Image == "" {
		faults.Add("tee.se.image", "build one with `cloister image se build` and name it",
			"is empty with tee.platform = %q: kernel, initrd and command line are in it", tee.SE)
	}
	if model, _, _ := strings.Cut(cfg.CPUModel, ","); model != "" && model != "host" {
		faults.Add("hypervisor.cpu_model", `give "" or "host"`, "%q: platform %q takes no model but \"host\"", cfg.CPUModel, tee.SE)
	}
	if cfg.Vsock == hypervisor.VsockVhostUser {
		faults.Add("hypervisor.vsock", fmt.Sprintf("set it to \"auto\" or %q", hypervisor.VsockVhost),
			"%q is a PCI device, which Secure Execution does not have", cfg.Vsock)
	}
	if err := faults.Err(); err != nil {
		return nil, err
	}
	return p, nil
}

// Name of the platform.
func (p *Platform) Name() tee.Name { return tee.SE }

// Files is the image.
func (p *Platform) Files() []tee.File {
	return []tee.File{{Key: "tee.se.image", Path: p.cfg.Image, Fix: "build it with `cloister image se build` or correct the key"}}
}

// SealedImage is the configured one.
func (p *Platform) SealedImage() string { return p.cfg.Image }

// BootsKernelFile is true: the image is the file.
func (*Platform) BootsKernelFile() bool { return true }

// CPUModel leaves the choice to the VMM, which with KVM is the host's: only that has the unpack facility.
func (*Platform) CPUModel() string { return "" }

// MeasuresCPUs is false: the image alone is measured.
func (*Platform) MeasuresCPUs() bool { return false }

// HostCanRead is false: what an image allows the host is sealed in it (pcf's dump bit), and not in a document.
func (*Platform) HostCanRead(hypervisor.Document) bool { return false }

// Explain knows the words of the boot loader in the image, on the guest's console.
func (*Platform) Explain(exit hypervisor.Exit) string { return explainBootError(exit.Console) }

// Prepare makes the document one that boots the image: whatever initrd and parameters stood there are in the image, or
// they are not used. All refusals are one error.
//
// in.InitdataDigest is not looked at: the binding is sealed in the image, and the agent enforces it (see the package).
func (p *Platform) Prepare(_ context.Context, doc *hypervisor.Document, _ tee.Inputs) error {
	prepared := *doc
	prepared.Boot = hypervisor.Boot{Kernel: p.cfg.Image, Sealed: true}
	prepared.Confidential = &hypervisor.Confidential{Platform: tee.SE, SecureExecution: true}
	faults := documentFaults(doc, prepared)
	info, err := p.inspect()
	switch {
	case err != nil:
		faults = append(faults, err)
	case uint64(info.Size) > doc.Memory.Bytes:
		faults = append(faults, fmt.Errorf("the image has %d bytes, the VM's memory %d", info.Size, doc.Memory.Bytes))
	}
	if err := faults.Of("SE"); err != nil {
		return err
	}
	*doc = prepared
	return nil
}

// documentFaults are what a Secure Execution guest cannot be or must not have, beside what holds for every VMM.
func documentFaults(doc *hypervisor.Document, prepared hypervisor.Document) hypervisor.Faults {
	faults := prepared.ConfidentialFaults()
	if doc.Boot.Firmware != "" {
		faults.Add("a firmware (%s) has no place in it: the guest starts with the image", doc.Boot.Firmware)
	}
	if model, _, _ := strings.Cut(doc.CPU.Model, ","); model != "host" {
		faults.Add("cpu.model %q: Secure Execution needs host, with its unpack facility", doc.CPU.Model)
	}
	if doc.Vsock.Kind == hypervisor.VsockVhostUser {
		faults.Add("vsock.kind %q is a PCI device, which Secure Execution does not have; load the module vhost_vsock and use %q",
			doc.Vsock.Kind, hypervisor.VsockVhost)
	}
	if c := doc.Confidential; c != nil && c.Platform != tee.SE {
		faults.Add("the VM is one of platform %q already", c.Platform)
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
		return nil, fmt.Errorf("%s: kernel, initrd and command line are not encrypted, initdata's digest neither: %w", p.cfg.Image,
			errdefs.ErrInvalidArgument)
	case info.PCF&image.AllowDump != 0 && !p.cfg.AllowDebug:
		return nil, fmt.Errorf("%s allows the host to take dumps of the guest; that is accepted only where debugging is allowed "+
			"(tee.allow_debug): %w", p.cfg.Image, errdefs.ErrInvalidArgument)
	}
	return info, nil
}

// Measure returns what names the image. Nothing of it depends on the VM's size or CPU.
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
		values = append(values, tee.Value{Name: "se.image_phkh", Hex: h.String(),
			Note: "evidence shows one of these: the machine that opened the image"})
	}
	return &tee.ReferenceValues{
		Platform: tee.SE,
		VCPUs:    doc.CPU.Count,
		CPUModel: doc.CPU.Model,
		Values:   values,
		Inputs:   []tee.Input{{Role: "image", Path: p.cfg.Image, SHA256: digest}},
	}, nil
}
