// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"encoding/binary"
	"path/filepath"
	"strings"
	"unicode/utf8"

	"github.com/cloister-project/cloister/hypervisor"
	"github.com/cloister-project/cloister/tee/abi"
)

// Platforms by name, as package tee has them.
const (
	platformSample = "sample"
	platformSNP    = "snp"
	platformTDX    = "tdx"
	platformSE     = "se"
)

const (
	// Bits of SNP's guest policy, SEV Secure Nested Paging Firmware ABI (AMD 56860) section 4.3.
	snpPolicyReserved = 1 << 17 // must be one
	// Where the policy is in an ID block, the same section on the ID block's structure.
	idBlockPolicy = 88
	// tdxSEPTVEDisable: without it the host can make accesses to private memory trap into the guest, which Linux refuses.
	tdxSEPTVEDisable = 1 << 28
	// maxPhysBit bounds CBitPosition and ReducedPhysBits: 6-bit fields of CPUID 0x8000001F EBX.
	maxPhysBit = 63
	maxSunPath = 107 // sun_path less the final NUL
)

// confidential checks the document's confidential part. What a platform needs and what would weaken it are told here,
// since QEMU or the hardware would tell it late, or not at all.
func (f *faults) confidential(doc hypervisor.Document) {
	c := doc.Confidential
	if c == nil {
		return
	}
	parts := map[string]bool{platformSNP: c.SNP != nil, platformTDX: c.TDX != nil, platformSE: c.SecureExecution}
	n := 0
	for _, set := range parts {
		if set {
			n++
		}
	}
	switch _, known := parts[c.Platform]; {
	case n > 1:
		f.add("confidential: more than one platform's part is set")
	case !known && c.Platform != platformSample:
		f.add("confidential.platform %q is not known", c.Platform)
	case known && !parts[c.Platform]:
		f.add("confidential.platform is %q and that platform's part is not set: nothing would protect the VM", c.Platform)
	case !known && n > 0:
		f.add("confidential.platform is %q and another platform's part is set", c.Platform)
	}
	if doc.SharedFolderPorts != 0 {
		f.add("shared_folder_ports %d: a confidential VM has no shared folders", doc.SharedFolderPorts)
	}
	if n > 0 && doc.Accelerator != hypervisor.AccelKVM {
		f.add("accelerator %q: only KVM has confidential VMs", doc.Accelerator)
	}
	if c.SNP != nil {
		f.x86TEE(doc, platformSNP)
		f.snp(doc, c.SNP)
	}
	if c.TDX != nil {
		f.x86TEE(doc, platformTDX)
		f.tdx(doc, c.TDX)
	}
	if c.SecureExecution {
		f.secureExecution(doc)
	}
}

func (f *faults) x86TEE(doc hypervisor.Document, name string) {
	if architecture(doc) != hypervisor.ArchAMD64 {
		f.add("confidential.%s is for %s, not for %s", name, hypervisor.ArchAMD64, doc.Architecture)
	}
	if doc.Boot.Firmware == "" {
		f.add("confidential.%s needs boot.firmware", name)
	}
}

// size checks a field that has exactly want bytes where it is given.
func (f *faults) size(field string, value []byte, want int) {
	if value != nil && len(value) != want {
		f.add("confidential.%s has %d bytes, not %d", field, len(value), want)
	}
}

func (f *faults) snp(doc hypervisor.Document, s *hypervisor.SNP) {
	if s.CBitPosition < 1 || s.CBitPosition > maxPhysBit {
		f.add("confidential.snp.cbit_position %d is not between 1 and %d", s.CBitPosition, maxPhysBit)
	}
	if s.ReducedPhysBits < 1 || s.ReducedPhysBits > maxPhysBit {
		f.add("confidential.snp.reduced_phys_bits %d is not between 1 and %d", s.ReducedPhysBits, maxPhysBit)
	}
	if s.Policy&snpPolicyReserved == 0 {
		f.add("confidential.snp.policy %#x: bit 17 must be one", s.Policy)
	}
	if doc.Boot.Kernel != "" && !s.KernelHashes {
		f.add("confidential.snp.kernel_hashes must be set: without it the host can change kernel, initrd and parameters unseen")
	}
	f.size("snp.host_data", s.HostData, abi.SNPHostDataSize)
	f.size("snp.id_block", s.IDBlock, abi.SNPIDBlockSize)
	f.size("snp.id_auth", s.IDAuth, abi.SNPIDAuthSize)
	if (s.IDBlock == nil) != (s.IDAuth == nil) {
		f.add("confidential.snp.id_block and id_auth belong together")
	}
	if s.AuthorKey && s.IDAuth == nil {
		f.add("confidential.snp.author_key needs id_block and id_auth")
	}
	if len(s.IDBlock) == abi.SNPIDBlockSize {
		if p := binary.LittleEndian.Uint64(s.IDBlock[idBlockPolicy:]); p != s.Policy {
			f.add("confidential.snp.id_block is for the policy %#x and the VM's is %#x: the firmware would refuse it", p, s.Policy)
		}
	}
	switch model, _, _ := strings.Cut(doc.CPU.Model, ","); model {
	case "host", "max":
		f.add("cpu.model %q is not a fixed one: the model is measured by SEV-SNP; name one, EPYC-v4 for example", doc.CPU.Model)
	}
}

func (f *faults) tdx(doc hypervisor.Document, t *hypervisor.TDX) {
	if model, _, _ := strings.Cut(doc.CPU.Model, ","); model != "host" {
		f.add("cpu.model %q: TDX takes no other model than host", doc.CPU.Model)
	}
	if t.Attributes&tdxSEPTVEDisable == 0 {
		f.add("confidential.tdx.attributes %#x: bit 28 (SEPT_VE_DISABLE) must be one", t.Attributes)
	}
	f.size("tdx.mrconfigid", t.MRConfigID, abi.TDXDigestSize)
	f.size("tdx.mrowner", t.MROwner, abi.TDXDigestSize)
	f.size("tdx.mrownerconfig", t.MROwnerConfig, abi.TDXDigestSize)
	q := t.QuoteSocket
	switch {
	case q == nil:
	case q.Path != "" && (q.CID != 0 || q.Port != 0):
		f.add("confidential.tdx.quote_socket has a path and a vsock address")
	case q.Path != "" && (!filepath.IsAbs(q.Path) || len(q.Path) > maxSunPath || !utf8.ValidString(q.Path)):
		f.add("confidential.tdx.quote_socket.path %q is no absolute path of at most %d bytes of UTF-8", q.Path, maxSunPath)
	case q.Path == "" && (q.CID < 2 || q.CID == 1<<32-1 || q.Port == 0 || q.Port == 1<<32-1):
		f.add("confidential.tdx.quote_socket: %d:%d is no vsock address, and no path is given", q.CID, q.Port)
	}
}

func (f *faults) secureExecution(doc hypervisor.Document) {
	if architecture(doc) != hypervisor.ArchS390X {
		f.add("confidential.secure_execution is for %s, not for %s", hypervisor.ArchS390X, architecture(doc))
	}
	if !doc.Boot.Sealed {
		f.add("confidential.secure_execution needs boot.sealed: nothing but the sealed image is protected")
	}
	if model, _, _ := strings.Cut(doc.CPU.Model, ","); model != "host" {
		f.add("cpu.model %q: Secure Execution needs host, with its unpack facility", doc.CPU.Model)
	}
	if doc.Vsock.Kind == hypervisor.VsockVhostUser {
		f.add("vsock.kind %q is a PCI device, which Secure Execution does not have; load the module vhost_vsock and use %q",
			doc.Vsock.Kind, hypervisor.VsockVhost)
	}
}
