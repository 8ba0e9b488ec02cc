// SPDX-License-Identifier: Apache-2.0

package snp

import (
	"context"
	"crypto/ecdsa"
	"encoding/hex"
	"fmt"
	"math"
	"slices"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/cloister-project/cloister/hypervisor"
	"github.com/cloister-project/cloister/tee"
	"github.com/cloister-project/cloister/tee/abi"
	"github.com/cloister-project/cloister/tee/firmware"
	"github.com/cloister-project/cloister/tee/hostprobe"
	"github.com/cloister-project/cloister/tee/initdata"
)

// Config of the platform, as the configuration file has it.
type Config struct {
	// IGVM: the VMM is Cloud Hypervisor, which launches IGVM files instead of firmware images. Firmware is the path of one then,
	// with "%d" for the number of virtual CPUs.
	IGVM bool
	// Firmware is the path of the image; empty: found by QEMU's firmware descriptors in the directories Descriptors (none:
	// firmware.DescriptorDirs).
	Firmware    string
	Descriptors []string
	// Digests are the SHA-256 digests, 64 hexadecimal digits, of the images that are accepted.
	Digests []string
	// AllowDebug accepts a debug policy, with which the host reads the guest.
	AllowDebug bool
	Policy     uint64
	// GuestFeatures is SEV_FEATURES as the host's kernel sets it, at least 1. An IGVM file has its own.
	GuestFeatures uint64
	// CPUModel is hypervisor.cpu_model: the model is measured. Empty: cpuModel.
	CPUModel string
	// IDKey and AuthorKey are paths of PEM files with ECDSA P-384 keys; empty: none. An author key needs an ID key.
	IDKey, AuthorKey string
	// FamilyID and ImageID of the ID block, 32 hexadecimal digits; empty: zero. GuestSVN likewise.
	FamilyID, ImageID string
	GuestSVN          int
}

// Platform is SEV-SNP on QEMU or Cloud Hypervisor; tee.Platform.
type Platform struct {
	config            Config
	policy            Policy
	familyID, imageID [16]byte

	// Tests show another machine.
	host hostprobe.Host
	sev  func() (hostprobe.SEVInfo, bool)
}

var _ tee.Platform = (*Platform)(nil)

// cpuModel is the CPU model of VMs where the configuration names none. The model is measured, so that it must not depend
// on the host's CPU; every processor with SNP can run this one.
const cpuModel = "EPYC-v4"

// fixNoIDKey is for settings that are part of the ID block.
const fixNoIDKey = "set tee.snp.id_key, or leave it out"

// featuresKnown are the bits of SEV_FEATURES that are defined (AMD64 Architecture Programmer's Manual volume 2, appendix B).
const featuresKnown = 1<<16 - 1

// New checks a configuration: errdefs.ErrInvalidArgument, all faults in one. It opens no file.
func New(c Config) (*Platform, error) {
	p := &Platform{config: c, policy: Policy(c.Policy), sev: hostprobe.SEV}
	var faults tee.Faults
	faults.CheckPaths(p.Files(), c.Descriptors)
	p.config.Digests = faults.Digests("tee.snp.firmware_digests", c.Digests)
	faults = append(faults, p.policy.Faults(c.AllowDebug)...)
	if c.GuestFeatures&snpActive == 0 || c.GuestFeatures&^featuresKnown != 0 {
		faults.Add("tee.snp.guest_features", "hosts set 0x1 as a rule",
			"%#x is not possible: bit 0 (SEV-SNP) must be set and bits from 16 on must not", c.GuestFeatures)
	}
	if c.AuthorKey != "" && c.IDKey == "" {
		faults.Add("tee.snp.author_key", "set both, or only tee.snp.id_key", "is set without tee.snp.id_key, the key that it signs")
	}
	for _, f := range []struct {
		key, text string
		to        *[16]byte
	}{{"tee.snp.family_id", c.FamilyID, &p.familyID}, {"tee.snp.image_id", c.ImageID, &p.imageID}} {
		raw, err := hex.DecodeString(f.text)
		switch {
		case f.text == "":
		case err != nil || len(raw) != len(f.to):
			faults.Add(f.key, "give 32", "%q is not 32 hexadecimal digits", f.text)
		case c.IDKey == "":
			faults.Add(f.key, fixNoIDKey, "is part of the ID block, which is made with tee.snp.id_key only")
		default:
			copy(f.to[:], raw)
		}
	}
	switch {
	case c.GuestSVN < 0 || int64(c.GuestSVN) > math.MaxUint32:
		faults.Add("tee.snp.guest_svn", "give one of these", "%d is not in 0 to %d", c.GuestSVN, uint32(math.MaxUint32))
	case c.GuestSVN != 0 && c.IDKey == "":
		faults.Add("tee.snp.guest_svn", fixNoIDKey, "is part of the ID block, which is made with tee.snp.id_key only")
	}
	if c.IGVM {
		faults = append(faults, c.igvmFaults()...)
	} else if m, _, _ := strings.Cut(c.CPUModel, ","); m == "host" || m == "max" {
		faults.Add("hypervisor.cpu_model", `give a fixed one such as "`+cpuModel+`", or "" for that`,
			"%q depends on the machine, and SEV-SNP measures the model", c.CPUModel)
	}
	if err := faults.Err(); err != nil {
		return nil, err
	}
	if len(p.config.Descriptors) == 0 {
		p.config.Descriptors = firmware.DescriptorDirs()
	}
	return p, nil
}

// igvmFaults is what cannot be had with IGVM files.
func (c Config) igvmFaults() (f tee.Faults) {
	if !strings.Contains(c.Firmware, cpusInPath) {
		f.Add("tee.snp.firmware", "give the path of one, with "+cpusInPath+" for the number of virtual CPUs",
			"%q is not the path of IGVM files, from which Cloud Hypervisor launches SEV-SNP: one for each number of virtual CPUs", c.Firmware)
	}
	if c.IDKey != "" {
		f.Add("tee.snp.id_key", `leave it out, or set hypervisor.kind = "qemu"`,
			"is set, and Cloud Hypervisor takes ID blocks from IGVM files only")
	}
	return f
}

// Name is tee.SNP.
func (*Platform) Name() tee.Name { return tee.SNP }

// Files are firmware and keys.
func (p *Platform) Files() []tee.File {
	image := tee.File{Key: "tee.snp.firmware", Path: p.config.Firmware,
		Fix: "install a firmware image built for SEV-SNP (Debian: ovmf-amdsev), or set the key to \"\" to have it found"}
	if p.config.IGVM { // which one, the number of virtual CPUs tells
		image.Path = ""
	}
	return []tee.File{
		image,
		{Key: "tee.snp.id_key", Path: p.config.IDKey, Fix: "make the file readable, or set the key to \"\""},
		{Key: "tee.snp.author_key", Path: p.config.AuthorKey, Fix: "make the file readable, or set the key to \"\""},
	}
}

// SealedImage returns none.
func (*Platform) SealedImage() string { return "" }

// BootsKernelFile is true: the firmware compares the file with its hash.
func (*Platform) BootsKernelFile() bool { return true }

// CPUModel is one that every processor with SEV-SNP can run. An IGVM file has the registers that a model would make.
func (p *Platform) CPUModel() string {
	if p.config.IGVM {
		return ""
	}
	return cpuModel
}

// MeasuresCPUs is true: each has a page with its first registers, which is measured.
func (*Platform) MeasuresCPUs() bool { return true }

// HostCanRead reports whether the policy is one for debugging.
func (*Platform) HostCanRead(doc hypervisor.Document) bool {
	c := doc.Confidential
	return c != nil && c.SNP != nil && Policy(c.SNP.Policy)&PolicyDebug != 0
}

// Explain knows the words of QEMU (accel/kvm, target/i386/kvm, target/i386/sev.c).
func (*Platform) Explain(exit hypervisor.Exit) string {
	return tee.Advise(exit.VMMLog,
		tee.Advice{Said: "vm-type SEV-SNP not supported by KVM", Do: "KVM on this host runs no SEV-SNP guests; `cloister check --tee snp` " +
			"tells what is missing"},
		tee.NoPrivateMemory,
		tee.Advice{Said: "cbitpos check failed", Do: "the C-bit's position in the VM's description is not this host's; `cloister check --tee " +
			"snp` tells what the host has"},
	)
}

// Prepare adds SEV-SNP to a document: the accepted firmware, policy, host data, the kernel hashes, and the signed ID block
// if there is a key. It looks at no hardware but the C-bit's place, which is not measured.
func (p *Platform) Prepare(ctx context.Context, doc *hypervisor.Document, in tee.Inputs) error {
	path, firmwareErr := p.firmwareFor(doc.CPU.Count)
	s := &hypervisor.SNP{CBitPosition: 51, ReducedPhysBits: 1, Policy: uint64(p.policy), KernelHashes: true}
	if sev, ok := p.sev(); ok && sev.SEV {
		s.CBitPosition, s.ReducedPhysBits = sev.CBitPosition, sev.ReducedPhysBits
	}
	if in.InitdataDigest != nil {
		s.HostData = initdata.Bind(in.InitdataDigest, abi.SNPHostDataSize)
	}
	prepared := *doc
	prepared.Boot.Firmware = path
	prepared.Confidential = &hypervisor.Confidential{Platform: tee.SNP, SNP: s}
	faults := p.documentFaults(doc, prepared)
	if firmwareErr != nil {
		faults = append(faults, firmwareErr)
	}
	if err := faults.Of("SEV-SNP"); err != nil {
		return err
	}
	if p.config.IDKey != "" {
		if err := p.sign(ctx, prepared); err != nil {
			return fmt.Errorf("SEV-SNP: %w", err)
		}
	}
	*doc = prepared
	return nil
}

// documentFaults are what the platform cannot run or measure.
func (p *Platform) documentFaults(doc *hypervisor.Document, prepared hypervisor.Document) hypervisor.Faults {
	if prepared.Boot.Firmware == "" {
		prepared.Boot.Firmware = "-" // that it is missing has an error of its own
	}
	faults := prepared.ConfidentialFaults()
	if _, err := CPUSignature(doc.CPU.Model); err != nil && !p.config.IGVM {
		faults = append(faults, err)
	}
	if doc.CPU.Count < 1 || doc.CPU.Count > MaxCPUs {
		faults.Add("%d virtual CPUs, possible are 1 to %d", doc.CPU.Count, MaxCPUs)
	}
	if c := doc.Confidential; c != nil && c.Platform != tee.SNP {
		faults.Add("the VM is prepared for %s already", c.Platform)
	}
	return faults
}

// sign makes the ID block of a document that is complete but for it.
func (p *Platform) sign(ctx context.Context, doc hypervisor.Document) error {
	id, author, err := p.keys()
	if err != nil {
		return err
	}
	l, _, err := p.launch(ctx, doc)
	if err != nil {
		return err
	}
	digest, err := l.Digest(doc.CPU.Count)
	if err != nil {
		return err
	}
	s := doc.Confidential.SNP
	s.IDBlock, s.IDAuth, err = Identity{
		Digest: digest, FamilyID: p.familyID, ImageID: p.imageID, GuestSVN: uint32(p.config.GuestSVN), Policy: p.policy,
	}.Sign(id, author)
	s.AuthorKey = author != nil
	return err
}

func (p *Platform) keys() (id, author *ecdsa.PrivateKey, err error) {
	if id, err = LoadKey(p.config.IDKey); err != nil {
		return nil, nil, fmt.Errorf("tee.snp.id_key: %w", err)
	}
	if p.config.AuthorKey != "" {
		if author, err = LoadKey(p.config.AuthorKey); err != nil {
			return nil, nil, fmt.Errorf("tee.snp.author_key: %w", err)
		}
	}
	return id, author, nil
}

// firmwareFor is the accepted image for a number of virtual CPUs.
func (p *Platform) firmwareFor(cpus int) (path string, err error) {
	if p.config.IGVM {
		path, _, _, err = p.acceptedIGVM(cpus)
	} else {
		path, _, err = p.acceptedFirmware()
	}
	return path, err
}

// acceptedFirmware finds the firmware and refuses all but those on the list of digests.
func (p *Platform) acceptedFirmware() (path, digest string, err error) {
	fail := func(err error, fix string) (string, string, error) {
		return "", "", &firmware.Error{Err: err, Fix: fix}
	}
	path = p.config.Firmware
	if path == "" {
		if path, err = firmware.Find(p.config.Descriptors, firmware.FeatureSNP); err != nil {
			return fail(err, fixFirmware)
		}
	}
	raw, digest, err := firmware.ReadFile(path, firmware.MaxSize)
	if err != nil {
		return fail(fmt.Errorf("firmware: %w", err), fixFirmware)
	}
	image, err := firmware.Parse(raw, firmware.FeatureSNP)
	if err != nil {
		return fail(fmt.Errorf("firmware %s: %w", path, err), firmware.FixDamaged)
	}
	// A table of zeros shows whether the metadata have all that a measured launch needs.
	if err := (Launch{Hashes: &Hashes{}}).sections(&launchContext{}, image); err != nil {
		return fail(fmt.Errorf("firmware %s: %w", path, err), fixFirmware)
	}
	if !slices.Contains(p.config.Digests, digest) {
		list := fmt.Sprintf("none of the %d accepted ones (tee.snp.firmware_digests)", len(p.config.Digests))
		if len(p.config.Digests) == 0 {
			list = "not accepted, since tee.snp.firmware_digests is empty"
		}
		return fail(fmt.Errorf("firmware %s has SHA-256 %s, which is %s. An ordinary OVMF has its hash table measured but boots any kernel "+
			"without comparing: the host could change kernel, initrd and command line under the same measurement, and nothing in the image "+
			"tells: %w", path, digest, list, errdefs.ErrInvalidArgument), fixFirmware)
	}
	return path, digest, nil
}

// fixFirmware is what to do about a firmware image that is missing, or another build than is needed.
const fixFirmware = "install a build of edk2's OvmfPkg/AmdSev, which compares what it boots with the hashes (Debian: ovmf-amdsev), set " +
	"tee.snp.firmware if no " +
	"descriptor names it, and add its digest to tee.snp.firmware_digests, if it is such a build from a source that you trust with your guests"
