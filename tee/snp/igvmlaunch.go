// SPDX-License-Identifier: Apache-2.0

package snp

import (
	"cmp"
	"context"
	"encoding/binary"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/cloister-project/cloister/hypervisor"
	"github.com/cloister-project/cloister/tee"
	"github.com/cloister-project/cloister/tee/firmware"
	"github.com/cloister-project/cloister/tee/snp/igvm"
)

const (
	// cpusInPath stands in Config.Firmware for the number of virtual CPUs: each number has an IGVM file of its own.
	cpusInPath = "%d"

	// pageUnmeasured is the page type of SNP_LAUNCH_UPDATE for pages that count with their address alone.
	pageUnmeasured = 4

	// Where Cloud Hypervisor puts the hash table of what it boots, and clears what follows it: edk2's OvmfPkg has its table
	// there (vmm/src/sev.rs, SEV_HASH_BLOCK_ADDRESS).
	hashBlockAddress = 0x10c00
	hashBlockSize    = 0x400
	hashBlockPage    = hashBlockAddress &^ (pageSize - 1)
)

// igvmPath is the IGVM file for a number of virtual CPUs.
func igvmPath(firmware string, cpus int) string {
	return strings.ReplaceAll(firmware, cpusInPath, strconv.Itoa(cpus))
}

// IGVMLaunch is all that the digest of a launch from an IGVM file covers, as Cloud Hypervisor v53 launches it on KVM.
type IGVMLaunch struct {
	File *igvm.File
	// Hashes of what is booted.
	Hashes Hashes
}

// Digest of the launch: the pages in the order of their addresses, then the virtual CPUs as KVM has them.
// errdefs.ErrInvalidArgument: the file has something else than a measured page where the hashes go.
func (l IGVMLaunch) Digest() (Digest, error) {
	pages, err := l.pages()
	if err != nil {
		return Digest{}, err
	}
	var c launchContext
	zeros := make([]byte, pageSize)
	for _, p := range pages {
		switch {
		case p.Type == igvm.Unmeasured:
			c.empty(pageUnmeasured, p.GPA, pageSize)
		case p.Type == igvm.Secrets:
			c.empty(pageSecrets, p.GPA, pageSize)
		case p.Type == igvm.CPUID:
			c.empty(pageCPUID, p.GPA, pageSize)
		case p.Data == nil:
			c.normal(p.GPA, zeros) // Cloud Hypervisor has no pages of type zero
		default:
			c.normal(p.GPA, p.Data)
		}
	}
	for _, state := range l.File.VMSAs {
		c.vmsa(launchedVMSA(state))
	}
	return c.ld, nil
}

// pages are the file's with the hash table in its place, on a page of its own where the file has none there.
func (l IGVMLaunch) pages() ([]igvm.Page, error) {
	pages := slices.Clone(l.File.Pages)
	i, found := slices.BinarySearchFunc(pages, uint64(hashBlockPage), func(p igvm.Page, gpa uint64) int { return cmp.Compare(p.GPA, gpa) })
	if !found {
		pages = slices.Insert(pages, i, igvm.Page{GPA: hashBlockPage})
	}
	if pages[i].Type != igvm.Normal {
		return nil, fmt.Errorf("the IGVM file has a page at %#x that is not measured, where the hashes of kernel, initrd and command line go: %w",
			uint64(hashBlockPage), errdefs.ErrInvalidArgument)
	}
	content := make([]byte, pageSize)
	copy(content, pages[i].Data)
	block := content[hashBlockAddress-hashBlockPage:][:hashBlockSize]
	clear(block)
	table := l.Hashes.Table()
	copy(block, table[:])
	pages[i].Data = content
	return pages, nil
}

// Bits that KVM sets and clears in the registers of a virtual CPU (arch/x86/kvm/svm/svm.c: svm_set_efer, svm_set_cr0, svm_set_cr4).
const (
	eferSVME   = 1 << 12
	cr0Caching = 3 << 29 // CD and NW
	cr4MCE     = 1 << 6
)

// launchedVMSA is the measured state of a virtual CPU whose state in the file is given. Cloud Hypervisor hands KVM the segments,
// descriptor tables, control registers but CR2, and the general registers (hypervisor/src/kvm/mod.rs, setup_sev_snp_regs); all
// else is as after a reset, and the features are the file's.
func launchedVMSA(file []byte) []byte {
	field := func(offset int) uint64 { return binary.LittleEndian.Uint64(file[offset:]) }
	page := vmsa(0, 0, field(0x3b0)|snpActive)
	put := func(offset int, value uint64) { binary.LittleEndian.PutUint64(page[offset:], value) }
	const (
		es, ss, gdtr, ldtr, idtr, tr, segmentSize = 0x00, 0x20, 0x60, 0x70, 0x80, 0x90, 0x10

		cpl, efer, cr4, cr3, cr0, rflags, rip, rsp, rax = 0xcb, 0xd0, 0x148, 0x150, 0x158, 0x170, 0x178, 0x1d8, 0x1f8
		rcx, rbx, rbp, r15                              = 0x308, 0x318, 0x328, 0x378
	)
	copy(page[es:gdtr], file[es:gdtr])
	for _, s := range []int{ldtr, tr} {
		copy(page[s:s+segmentSize], file[s:s+segmentSize])
	}
	for _, s := range []int{gdtr, idtr} { // limits have 16 bits
		copy(page[s+4:s+6], file[s+4:s+6])
		clear(page[s+6 : s+8])
		copy(page[s+8:s+segmentSize], file[s+8:s+segmentSize])
	}
	page[cpl] = byte(binary.LittleEndian.Uint16(file[ss+2:])>>5) & 3 // DPL of the stack's segment
	put(efer, field(efer)|eferSVME)
	put(cr4, field(cr4)|cr4MCE)
	put(cr3, field(cr3))
	put(cr0, field(cr0)&^cr0Caching)
	put(rflags, field(rflags)|2) // always one
	for _, r := range []int{rip, rsp, rax} {
		put(r, field(r))
	}
	copy(page[rcx:rbx+8], file[rcx:rbx+8]) // RCX, RDX, RBX; RSP stands elsewhere
	copy(page[rbp:r15+8], file[rbp:r15+8])
	return page
}

// acceptedIGVM reads the IGVM file for a number of virtual CPUs and refuses all but those on the list of digests.
func (p *Platform) acceptedIGVM(cpus int) (path, digest string, file *igvm.File, err error) {
	const fix = "build one for each number of virtual CPUs from a firmware that compares what it boots with the hashes, set " +
		"tee.snp.firmware to its path with " + cpusInPath + " for the number, and add each file's digest to tee.snp.firmware_digests"
	path = igvmPath(p.config.Firmware, cpus)
	raw, digest, err := firmware.ReadFile(path, igvm.MaxSize)
	switch {
	case err != nil:
	case !slices.Contains(p.config.Digests, digest):
		err = fmt.Errorf("%s has SHA-256 %s, which is none of the %d accepted ones (tee.snp.firmware_digests): %w", path, digest,
			len(p.config.Digests), errdefs.ErrInvalidArgument)
	default:
		if file, err = igvm.Parse(raw); err == nil {
			err = p.checkIGVM(file, cpus)
		}
		if err != nil {
			err = fmt.Errorf("%s: %w", path, err)
		}
	}
	if err != nil {
		return "", "", nil, &firmware.Error{Err: fmt.Errorf("IGVM file for %d virtual CPUs: %w", cpus, err), Fix: fix}
	}
	return path, digest, file, nil
}

// checkIGVM compares a file with what is configured.
func (p *Platform) checkIGVM(file *igvm.File, cpus int) error {
	switch {
	case len(file.VMSAs) != cpus:
		return fmt.Errorf("it is for %d virtual CPUs, not %d: %w", len(file.VMSAs), cpus, errdefs.ErrInvalidArgument)
	case Policy(file.Policy) != p.policy:
		return fmt.Errorf("its guest policy is %#x, and tee.snp.policy %#x: %w", file.Policy, uint64(p.policy), errdefs.ErrInvalidArgument)
	}
	_, err := IGVMLaunch{File: file}.Digest()
	return err
}

// igvmLaunches are the launches of a document from the IGVM file of each number of virtual CPUs.
func (p *Platform) igvmLaunches(ctx context.Context, doc hypervisor.Document, first, last int) (all []measured, err error) {
	if first < 1 || last < first || last > MaxCPUs {
		return nil, fmt.Errorf("digests for %d to %d virtual CPUs; possible are 1 to %d: %w", first, last, MaxCPUs, errdefs.ErrInvalidArgument)
	}
	hashes, booted, err := bootHashes(ctx, doc)
	if err != nil {
		return nil, err
	}
	for cpus := first; cpus <= last; cpus++ {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		path, digest, file, err := p.acceptedIGVM(cpus)
		if err != nil {
			return nil, err
		}
		m := measured{inputs: append([]tee.Input{{Role: "firmware", Path: path, SHA256: digest}}, booted...)}
		if m.digest, err = (IGVMLaunch{File: file, Hashes: hashes}).Digest(); err != nil {
			return nil, err
		}
		all = append(all, m)
	}
	return all, nil
}
