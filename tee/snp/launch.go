// SPDX-License-Identifier: Apache-2.0

package snp

import (
	"fmt"

	"github.com/containerd/errdefs"

	"github.com/cloister-project/cloister/tee/firmware"
)

// MaxCPUs is the largest number of virtual CPUs that is measured; QEMU's q35 with KVM has up to 4096, EPYC hosts 1024.
const MaxCPUs = 1024

// snpActive is the bit of SEV_FEATURES without which a virtual CPU is no SEV-SNP one.
const snpActive = 1 << 0

// Launch is all that a launch digest covers.
type Launch struct {
	// Firmware is the whole image.
	Firmware []byte
	// CPUSignature of the CPU model (CPUSignature).
	CPUSignature uint32
	// GuestFeatures is SEV_FEATURES of each virtual CPU's state, which the host's kernel sets: 1 is SEV-SNP alone.
	GuestFeatures uint64
	// Hashes of what is booted; nil: QEMU is started without kernel-hashes.
	Hashes *Hashes
}

// Digest for a number of virtual CPUs. errdefs.ErrInvalidArgument as with Digests.
func (l Launch) Digest(cpus int) (Digest, error) {
	d, err := l.Digests(cpus, cpus)
	if err != nil {
		return Digest{}, err
	}
	return d[0], nil
}

// Digests for first to last virtual CPUs, in one pass. errdefs.ErrInvalidArgument: the firmware has no SNP metadata or one
// that is not understood, it lacks a place for hashes that are given, or the numbers are not possible.
func (l Launch) Digests(first, last int) ([]Digest, error) {
	if first < 1 || last < first || last > MaxCPUs {
		return nil, fmt.Errorf("digests for %d to %d virtual CPUs; possible are 1 to %d: %w", first, last, MaxCPUs, errdefs.ErrInvalidArgument)
	}
	image, err := firmware.Parse(l.Firmware, firmware.FeatureSNP)
	if err != nil {
		return nil, err
	}
	var c launchContext
	c.normal(image.Base(), l.Firmware)
	if err := l.sections(&c, image); err != nil {
		return nil, err
	}
	// QEMU's order: the first virtual CPU, then the others, which all start at the same place.
	c.vmsa(vmsa(bspEIP, l.CPUSignature, l.GuestFeatures))
	digests := []Digest{c.ld}
	if last > 1 {
		if !image.HasReset {
			return nil, fmt.Errorf("the firmware does not say where further virtual CPUs start (SEV-ES reset block); with it a VM can have one: %w",
				errdefs.ErrInvalidArgument)
		}
		ap := vmsa(image.ResetEIP, l.CPUSignature, l.GuestFeatures)
		for len(digests) < last {
			c.vmsa(ap)
			digests = append(digests, c.ld)
		}
	}
	return digests[first-1:], nil
}

// sections measures what the firmware's metadata names, in the table's order, as QEMU does without a service module.
func (l Launch) sections(c *launchContext, image *firmware.Image) error {
	if len(image.SNP) == 0 {
		return fmt.Errorf("the firmware has no SNP metadata; it cannot be launched with SEV-SNP: %w", errdefs.ErrInvalidArgument)
	}
	hashed := false
	for n, s := range image.SNP {
		gpa, size := uint64(s.Base), uint64(s.Size)
		if size == 0 {
			return fmt.Errorf("section %d of the firmware's SNP metadata, %s, is empty, which KVM refuses; the build is not one for SEV-SNP: %w", n,
				s.Type, errdefs.ErrInvalidArgument)
		}
		if s.Type != firmware.SNPMemory && s.Type != firmware.SNPSVSMCAA && size != pageSize {
			return fmt.Errorf("section %d of the firmware's SNP metadata, %s, has %#x bytes, want one page: %w", n, s.Type, size,
				errdefs.ErrInvalidArgument)
		}
		switch s.Type {
		case firmware.SNPMemory, firmware.SNPSVSMCAA:
			c.empty(pageZero, gpa, size)
		case firmware.SNPSecrets:
			c.empty(pageSecrets, gpa, size)
		case firmware.SNPCPUID:
			c.empty(pageCPUID, gpa, size)
		case firmware.SNPKernelHashes:
			if hashed {
				return fmt.Errorf("the firmware's SNP metadata have two sections %s: %w", s.Type, errdefs.ErrInvalidArgument)
			}
			hashed = true
			if l.Hashes == nil {
				c.empty(pageZero, gpa, size)
				break
			}
			page, err := l.hashPage(image, gpa)
			if err != nil {
				return err
			}
			c.normal(gpa, page)
		default:
			return fmt.Errorf("section %d of the firmware's SNP metadata is of %s, which is not known: its measurement cannot be predicted: %w", n,
				s.Type, errdefs.ErrInvalidArgument)
		}
	}
	if l.Hashes != nil && !hashed {
		return fmt.Errorf("the firmware's SNP metadata have no section KERNEL_HASHES: it cannot check what it boots: %w",
			errdefs.ErrInvalidArgument)
	}
	return nil
}

// hashPage is the page at gpa with the hash table where the firmware looks for it.
func (l Launch) hashPage(image *firmware.Image, gpa uint64) ([]byte, error) {
	table := l.Hashes.Table()
	switch a := image.HashTable; {
	case a == nil:
		return nil, fmt.Errorf("the firmware has no entry for a hash table: it cannot check what it boots: %w", errdefs.ErrInvalidArgument)
	case a.Size < HashTableSize:
		return nil, fmt.Errorf("the firmware's place for a hash table has %d bytes, want %d: %w", a.Size, HashTableSize,
			errdefs.ErrInvalidArgument)
	case uint64(a.Base) < gpa || uint64(a.Base)+HashTableSize > gpa+pageSize:
		return nil, fmt.Errorf("the firmware looks for a hash table at %#x, which is not in its section KERNEL_HASHES at %#x: %w", a.Base, gpa,
			errdefs.ErrInvalidArgument)
	default:
		page := make([]byte, pageSize)
		copy(page[uint64(a.Base)-gpa:], table[:])
		return page, nil
	}
}
