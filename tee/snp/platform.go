// SPDX-License-Identifier: Apache-2.0

package snp

import (
	"context"
	"crypto/ecdsa"
	"encoding/hex"
	"errors"
	"fmt"
	"math"
	"path/filepath"
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
	// Firmware is the path of the image; empty: found by QEMU's firmware descriptors in the folders Descriptors (none:
	// firmware.DescriptorDirs).
	Firmware    string
	Descriptors []string
	// Digests are the SHA-256 digests, 64 hexadecimal digits, of the images that are accepted.
	Digests []string
	// AllowDebug accepts a debug policy, with which the host reads the guest.
	AllowDebug bool
	Policy     uint64
	// GuestFeatures is SEV_FEATURES as the host's kernel sets it, at least 1.
	GuestFeatures uint64
	// IDKey and AuthorKey are paths of PEM files with ECDSA P-384 keys; empty: none. An author key needs an ID key.
	IDKey, AuthorKey string
	// FamilyID and ImageID of the ID block, 32 hexadecimal digits; empty: zero. GuestSVN likewise.
	FamilyID, ImageID string
	GuestSVN          int
}

// Platform is SEV-SNP on QEMU; tee.Platform.
type Platform struct {
	config            Config
	policy            Policy
	familyID, imageID [16]byte

	// Tests show another machine.
	host hostprobe.Host
	sev  func() (hostprobe.SEVInfo, bool)
}

var _ tee.Platform = (*Platform)(nil)

// featuresKnown are the bits of SEV_FEATURES that are defined (AMD64 Architecture Programmer's Manual volume 2, appendix B).
const featuresKnown = 1<<16 - 1

// New checks a configuration: errdefs.ErrInvalidArgument, all faults in one. It opens no file.
func New(c Config) (*Platform, error) {
	p := &Platform{config: c, policy: Policy(c.Policy), sev: hostprobe.SEV}
	var faults []error
	fault := func(format string, a ...any) {
		faults = append(faults, fmt.Errorf(format+": %w", append(a, errdefs.ErrInvalidArgument)...))
	}
	for _, f := range []struct{ key, path string }{{"tee.snp.firmware", c.Firmware}, {"tee.snp.id_key", c.IDKey}, {"tee.snp.author_key", c.AuthorKey}} {
		if f.path != "" && !filepath.IsAbs(f.path) {
			fault("%s %q is no absolute path", f.key, f.path)
		}
	}
	for _, d := range c.Descriptors {
		if !filepath.IsAbs(d) {
			fault("tee.firmware_descriptors: %q is no absolute path", d)
		}
	}
	p.config.Digests = nil
	for _, d := range c.Digests {
		if raw, err := hex.DecodeString(d); err != nil || len(raw) != 32 {
			fault("tee.snp.firmware_digests: %q is no SHA-256 digest, 64 hexadecimal digits", d)
		}
		p.config.Digests = append(p.config.Digests, strings.ToLower(d))
	}
	if err := p.policy.Validate(c.AllowDebug); err != nil {
		faults = append(faults, err)
	}
	if c.GuestFeatures&snpActive == 0 || c.GuestFeatures&^featuresKnown != 0 {
		fault("tee.snp.guest_features %#x is not possible: bit 0 (SEV-SNP) must be set and bits from 16 on must not; hosts set 0x1 as a rule", c.GuestFeatures)
	}
	if c.AuthorKey != "" && c.IDKey == "" {
		fault("tee.snp.author_key signs the ID key; set tee.snp.id_key too")
	}
	for _, f := range []struct {
		key, text string
		to        *[16]byte
	}{{"tee.snp.family_id", c.FamilyID, &p.familyID}, {"tee.snp.image_id", c.ImageID, &p.imageID}} {
		raw, err := hex.DecodeString(f.text)
		switch {
		case f.text == "":
		case err != nil || len(raw) != len(f.to):
			fault("%s %q is not 32 hexadecimal digits", f.key, f.text)
		case c.IDKey == "":
			fault("%s is part of the ID block, which is made with tee.snp.id_key only", f.key)
		default:
			copy(f.to[:], raw)
		}
	}
	switch {
	case c.GuestSVN < 0 || int64(c.GuestSVN) > math.MaxUint32:
		fault("tee.snp.guest_svn %d is not in 0..%d", c.GuestSVN, uint32(math.MaxUint32))
	case c.GuestSVN != 0 && c.IDKey == "":
		fault("tee.snp.guest_svn is part of the ID block, which is made with tee.snp.id_key only")
	}
	if err := errors.Join(faults...); err != nil {
		return nil, err
	}
	if len(p.config.Descriptors) == 0 {
		p.config.Descriptors = firmware.DescriptorDirs()
	}
	return p, nil
}

// Name is tee.SNP.
func (*Platform) Name() tee.Name { return tee.SNP }

// Prepare adds SEV-SNP to a document: the accepted firmware, policy, host data, the kernel hashes, and the signed ID block
// if there is a key. It looks at no hardware but the C-bit's place, which is not measured.
func (p *Platform) Prepare(ctx context.Context, doc *hypervisor.Document, in tee.Inputs) error {
	path, _, err := p.acceptedFirmware()
	if err != nil {
		err = fmt.Errorf("%w; %s", err, fixFirmware)
	}
	if err := errors.Join(checkDocument(doc), err); err != nil {
		return fmt.Errorf("SEV-SNP: %w", err)
	}
	s := &hypervisor.SNP{CBitPosition: 51, ReducedPhysBits: 1, Policy: uint64(p.policy), KernelHashes: true}
	if sev, ok := p.sev(); ok && sev.SEV {
		s.CBitPosition, s.ReducedPhysBits = sev.CBitPosition, sev.ReducedPhysBits
	}
	if in.InitdataDigest != nil {
		s.HostData = initdata.Bind(in.InitdataDigest, abi.SNPHostDataSize)
	}
	prepared := *doc
	prepared.Boot.Firmware = path
	prepared.Confidential = &hypervisor.Confidential{Platform: string(tee.SNP), SNP: s}
	if p.config.IDKey != "" {
		if err := p.sign(ctx, prepared); err != nil {
			return fmt.Errorf("SEV-SNP: %w", err)
		}
	}
	*doc = prepared
	return nil
}

// checkDocument refuses what the platform cannot run or measure, all reasons in one.
func checkDocument(doc *hypervisor.Document) error {
	var faults []error
	fault := func(format string, a ...any) {
		faults = append(faults, fmt.Errorf(format+": %w", append(a, errdefs.ErrInvalidArgument)...))
	}
	if doc.Architecture != hypervisor.ArchAMD64 {
		fault("the guest is %s; SEV-SNP guests are amd64 (hypervisor.arch)", doc.Architecture)
	}
	if doc.Accelerator != hypervisor.AccelKVM {
		fault("the accelerator is %s; SEV-SNP needs kvm, and the kernel's measured parameters depend on it (hypervisor.accel)", doc.Accelerator)
	}
	if _, err := CPUSignature(doc.CPU.Model); err != nil {
		faults = append(faults, err)
	}
	if doc.CPU.Count < 1 || doc.CPU.Count > MaxCPUs {
		fault("%d virtual CPUs, possible are 1 to %d", doc.CPU.Count, MaxCPUs)
	}
	if doc.Boot.Sealed || doc.Boot.Kernel == "" {
		fault("there is no kernel to measure: it is part of a sealed image, or not given")
	}
	if doc.SharedFolderPorts > 0 {
		fault("the VM has places for shared folders, whose content the host can change at any time")
	}
	if c := doc.Confidential; c != nil && (c.TDX != nil || c.SecureExecution) {
		fault("the VM is prepared for %s already", c.Platform)
	}
	return errors.Join(faults...)
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

// acceptedFirmware finds the firmware and refuses all but those on the list of digests.
func (p *Platform) acceptedFirmware() (path, digest string, err error) {
	path = p.config.Firmware
	if path == "" {
		if path, err = firmware.Find(p.config.Descriptors, firmware.FeatureSNP); err != nil {
			return "", "", err
		}
	}
	raw, digest, err := firmware.ReadFile(path, firmware.MaxSize)
	if err != nil {
		return "", "", fmt.Errorf("firmware: %w", err)
	}
	image, err := firmware.Parse(raw)
	if err != nil {
		return "", "", fmt.Errorf("firmware %s: %w", path, err)
	}
	// A table of zeros shows whether the metadata have all that a measured launch needs.
	if err := (Launch{Hashes: &Hashes{}}).sections(&launchContext{}, image); err != nil {
		return "", "", fmt.Errorf("firmware %s: %w", path, err)
	}
	if !slices.Contains(p.config.Digests, digest) {
		return "", "", &firmwareError{path: path, digest: digest, listed: len(p.config.Digests)}
	}
	return path, digest, nil
}

// firmwareError is errdefs.ErrInvalidArgument.
type firmwareError struct {
	path, digest string
	listed       int
}

func (e *firmwareError) Error() string {
	list := fmt.Sprintf("none of the %d accepted ones (tee.snp.firmware_digests)", e.listed)
	if e.listed == 0 {
		list = "not accepted, since tee.snp.firmware_digests is empty"
	}
	return fmt.Sprintf("firmware %s has SHA-256 %s, which is %s. An ordinary OVMF has its hash table measured but boots any kernel without comparing: "+
		"the host could change kernel, initrd and command line under the same measurement, and nothing in the image tells", e.path, e.digest, list)
}

// Is makes it an errdefs.ErrInvalidArgument.
func (*firmwareError) Is(target error) bool { return target == errdefs.ErrInvalidArgument }

// fixFirmware is what to do about any of acceptedFirmware's errors.
const fixFirmware = "install a build of edk2's OvmfPkg/AmdSev, which compares what it boots with the hashes (Debian: ovmf-amdsev), set tee.snp.firmware if no " +
	"descriptor names it, and add its digest to tee.snp.firmware_digests, if it is such a build from a source that you trust with your guests"
