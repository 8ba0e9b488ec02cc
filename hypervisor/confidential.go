// SPDX-License-Identifier: Apache-2.0

package hypervisor

import "github.com/cloister-project/cloister/tee/abi"

// Confidential is what makes a VM a confidential one. A driver that sees it gives every virtio device the guest's DMA
// rules (iommu_platform) and the modern interface only, and nothing that shares host directories or resizes memory. At most
// one of the platforms' parts is set; with none the rules stand alone and no hardware protects anything.
type Confidential struct {
	// Platform is for messages and records; a driver decides by the parts below.
	Platform abi.Platform `json:"platform"`
	SNP      *SNP         `json:"snp,omitempty"`
	TDX      *TDX         `json:"tdx,omitempty"`
	// SecureExecution asks for IBM Secure Execution; all its parameters are in the sealed image (Boot.Sealed).
	SecureExecution bool `json:"secure_execution,omitempty"`
}

// SNP is an AMD SEV-SNP launch: SEV Secure Nested Paging Firmware ABI Specification (AMD 56860), SNP_LAUNCH_START and
// SNP_LAUNCH_FINISH. Byte fields are nil where they are not given; their sizes are exact.
type SNP struct {
	// CBitPosition and ReducedPhysBits are the host's, CPUID 0x8000001F EBX.
	CBitPosition    uint32 `json:"cbit_position"`
	ReducedPhysBits uint32 `json:"reduced_phys_bits"`
	// Policy of the guest, 56860 section 4.3.
	Policy uint64 `json:"policy"`
	// KernelHashes puts the hashes of kernel, initrd and parameters where the firmware checks them, measured.
	KernelHashes bool   `json:"kernel_hashes"`
	HostData     []byte `json:"host_data,omitempty"`
	// IDBlock and IDAuth belong together.
	IDBlock []byte `json:"id_block,omitempty"`
	IDAuth  []byte `json:"id_auth,omitempty"`
	// AuthorKey: IDAuth holds an author key's signature as well.
	AuthorKey bool `json:"author_key,omitempty"`
}

// TDX is an Intel TDX launch: TD_PARAMS of TDH.MNG.INIT, Intel TDX Module Base Architecture Specification. Digests are
// nil where they are not given.
type TDX struct {
	// Attributes of the TD, ATTRIBUTES of TD_PARAMS.
	Attributes    uint64 `json:"attributes"`
	MRConfigID    []byte `json:"mrconfigid,omitempty"`
	MROwner       []byte `json:"mrowner,omitempty"`
	MROwnerConfig []byte `json:"mrownerconfig,omitempty"`
	// QuoteSocket is where quotes come from; nil: the guest gets none.
	QuoteSocket *QuoteSocket `json:"quote_socket,omitempty"`
}

// QuoteSocket is the address of a Quote Generation Service: a unix socket's Path, or vsock if Path is empty.
type QuoteSocket struct {
	Path string `json:"path,omitempty"`
	CID  uint32 `json:"cid,omitempty"`
	Port uint32 `json:"port,omitempty"`
}
