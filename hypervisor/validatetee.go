// SPDX-License-Identifier: Apache-2.0

package hypervisor

import (
	"path/filepath"
	"unicode/utf8"

	"github.com/cloister-project/cloister/tee/abi"
)

const (
	// maxPhysBit bounds CBitPosition and ReducedPhysBits: 6-bit fields of CPUID 0x8000001F EBX.
	maxPhysBit = 63
	maxSunPath = 107 // sun_path less the final NUL
)

// ConfidentialFaults checks the document's confidential part, for every VMM: that it is whole, and that nothing beside it
// takes away what it promises. What VMM or hardware would tell late, or not at all, is told here. The meaning of what is
// in a platform's part (policy bits, attributes, CPU models) is that platform's package's to judge; its Prepare calls this
// as well. Without a confidential part there are no faults.
func (d Document) ConfidentialFaults() (f Faults) {
	c := d.Confidential
	if c == nil {
		return nil
	}
	parts := map[abi.Platform]bool{abi.SNP: c.SNP != nil, abi.TDX: c.TDX != nil, abi.SE: c.SecureExecution}
	n := 0
	for _, set := range parts {
		if set {
			n++
		}
	}
	switch _, known := parts[c.Platform]; {
	case n > 1:
		f.Add("confidential: more than one platform's part is set")
	case !known && c.Platform != abi.Sample:
		f.Add("confidential.platform %q is not known", c.Platform)
	case known && !parts[c.Platform]:
		f.Add("confidential.platform is %q and that platform's part is not set: nothing would protect the VM", c.Platform)
	case !known && n > 0:
		f.Add("confidential.platform is %q and another platform's part is set", c.Platform)
	}
	if want := c.Platform.Architecture(); want != "" && d.Arch() != Architecture(want) {
		f.Add("confidential.platform %q is of the architecture %s, and the VM is for %s (hypervisor.arch)", c.Platform, want, d.Arch())
	}
	if d.Memory.Reporting {
		f.Add("memory.reporting: a confidential VM keeps its memory")
	}
	if d.Memory.MaxBytes != 0 {
		f.Add("memory.max_bytes: a confidential VM does not grow: its launch is measured")
	}
	if d.SharedDirectories != 0 {
		f.Add("shared_directories %d: a confidential VM has no shared directories, whose content the host can change at any time",
			d.SharedDirectories)
	}
	if d.Boot.Kernel == "" {
		f.Add("boot.kernel is not given: the VM would boot what a disk holds")
	}
	if n > 0 && d.Accelerator != AccelKVM {
		f.Add("accelerator %q: only KVM has confidential VMs (hypervisor.accel)", d.Accelerator)
	}
	if c.SNP != nil || c.TDX != nil {
		if d.Boot.Firmware == "" {
			f.Add("confidential.%s needs boot.firmware", c.Platform)
		}
		if d.Boot.Sealed {
			f.Add("boot.sealed: the image is sealed for another platform, and has no kernel that %s could measure", c.Platform)
		}
	}
	if c.SNP != nil {
		f.snp(c.SNP)
	}
	if c.TDX != nil {
		f.tdx(c.TDX)
	}
	if c.SecureExecution && !d.Boot.Sealed {
		f.Add("confidential.secure_execution needs boot.sealed: nothing but the sealed image is protected")
	}
	return f
}

// size checks a field that has exactly want bytes where it is given.
func (f *Faults) size(field string, value []byte, want int) {
	if value != nil && len(value) != want {
		f.Add("confidential.%s has %d bytes, not %d", field, len(value), want)
	}
}

func (f *Faults) snp(s *SNP) {
	if s.CBitPosition < 1 || s.CBitPosition > maxPhysBit {
		f.Add("confidential.snp.cbit_position %d is not between 1 and %d", s.CBitPosition, maxPhysBit)
	}
	if s.ReducedPhysBits < 1 || s.ReducedPhysBits > maxPhysBit {
		f.Add("confidential.snp.reduced_phys_bits %d is not between 1 and %d", s.ReducedPhysBits, maxPhysBit)
	}
	if !s.KernelHashes {
		f.Add("confidential.snp.kernel_hashes must be set: without it the host can change kernel, initrd and parameters unseen")
	}
	f.size("snp.host_data", s.HostData, abi.SNPHostDataSize)
	f.size("snp.id_block", s.IDBlock, abi.SNPIDBlockSize)
	f.size("snp.id_auth", s.IDAuth, abi.SNPIDAuthSize)
	if (s.IDBlock == nil) != (s.IDAuth == nil) {
		f.Add("confidential.snp.id_block and id_auth belong together")
	}
	if s.AuthorKey && s.IDAuth == nil {
		f.Add("confidential.snp.author_key needs id_block and id_auth")
	}
}

func (f *Faults) tdx(t *TDX) {
	f.size("tdx.mrconfigid", t.MRConfigID, abi.TDXDigestSize)
	f.size("tdx.mrowner", t.MROwner, abi.TDXDigestSize)
	f.size("tdx.mrownerconfig", t.MROwnerConfig, abi.TDXDigestSize)
	q := t.QuoteSocket
	switch {
	case q == nil:
	case q.Path != "" && (q.CID != 0 || q.Port != 0):
		f.Add("confidential.tdx.quote_socket has a path and a vsock address")
	case q.Path != "" && (!filepath.IsAbs(q.Path) || len(q.Path) > maxSunPath || !utf8.ValidString(q.Path)):
		f.Add("confidential.tdx.quote_socket.path %q is no absolute path of at most %d bytes of UTF-8", q.Path, maxSunPath)
	case q.Path == "" && (q.CID < 2 || q.CID == 1<<32-1 || q.Port == 0 || q.Port == 1<<32-1):
		f.Add("confidential.tdx.quote_socket: %d:%d is no vsock address, and no path is given", q.CID, q.Port)
	}
}
