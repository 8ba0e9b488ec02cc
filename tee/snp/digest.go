// SPDX-License-Identifier: Apache-2.0

package snp

import (
	"crypto/sha512"
	"encoding/binary"
)

// DigestSize of a launch digest and of key digests, in bytes (SHA-384).
const DigestSize = sha512.Size384

// Digest is a launch digest: MEASUREMENT of the attestation report.
type Digest [DigestSize]byte

// Page types of SNP_LAUNCH_UPDATE, 56860 section 8.17.
const (
	pageNormal  = 1
	pageVMSA    = 2
	pageZero    = 3
	pageSecrets = 5
	pageCPUID   = 6
)

const (
	pageSize = 4096
	// vmsaAddress is what counts as the address of each virtual CPU's state: it has none in the guest, KVM gives this.
	vmsaAddress = 0xfffffffff000

	pageInfoSize = 0x70
)

// launchContext is the launch context as far as the digest goes (GCTX.LD). The zero value is that of a new guest.
type launchContext struct {
	ld Digest
}

// page measures one page: 56860, SNP_LAUNCH_UPDATE, PAGE_INFO. contents is the SHA-384 of pages whose content counts, and zero
// for the others.
func (c *launchContext) page(kind byte, gpa uint64, contents Digest) {
	var info [pageInfoSize]byte
	copy(info[0:], c.ld[:])
	copy(info[48:], contents[:])
	binary.LittleEndian.PutUint16(info[96:], pageInfoSize)
	info[98] = kind
	// 99: no IMI page; 100..103: no permissions for VMPL 1 to 3.
	binary.LittleEndian.PutUint64(info[104:], gpa)
	c.ld = sha512.Sum384(info[:])
}

// normal measures pages with content; len(data) is a multiple of a page.
func (c *launchContext) normal(gpa uint64, data []byte) {
	for ; len(data) > 0; data, gpa = data[pageSize:], gpa+pageSize {
		c.page(pageNormal, gpa, contents(data[:pageSize]))
	}
}

// empty measures size bytes of pages without content.
func (c *launchContext) empty(kind byte, gpa, size uint64) {
	for end := gpa + size; gpa < end; gpa += pageSize {
		c.page(kind, gpa, Digest{})
	}
}

// contents is what stands for a page's content in the measurement.
func contents(page []byte) Digest { return sha512.Sum384(page) }

// vmsa measures the initial state of a virtual CPU.
func (c *launchContext) vmsa(page []byte) { c.page(pageVMSA, vmsaAddress, contents(page)) }
