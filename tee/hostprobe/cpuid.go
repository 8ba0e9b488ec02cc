// SPDX-License-Identifier: Apache-2.0

package hostprobe

import "github.com/klauspost/cpuid/v2"

// SEVInfo is what CPUID Fn8000_001F says of AMD's memory encryption: AMD64 Architecture Programmer's Manual volume 3
// (24594), E.4.17.
type SEVInfo struct {
	SEV bool `json:"sev"`
	ES  bool `json:"sev_es"`
	SNP bool `json:"sev_snp"`
	// CBitPosition is the page table's bit that marks encrypted memory, 51 on recent CPUs.
	CBitPosition uint32 `json:"cbit_position"`
	// ReducedPhysBits is by how many bits physical addresses are shorter with encryption.
	ReducedPhysBits uint32 `json:"reduced_phys_bits"`
	// ASIDs is the number of encrypted guests that can run at once, all kinds together.
	ASIDs uint32 `json:"asids"`
	// MinSEVASID is the lowest ASID of a plain SEV guest; SEV-ES and SEV-SNP guests use those below it.
	MinSEVASID uint32 `json:"min_sev_asid"`
}

// SEV asks this CPU. False: it is no AMD CPU, or one without that leaf or without any memory encryption. In a VM the
// answer is what the hypervisor shows.
func SEV() (SEVInfo, bool) {
	enc := cpuid.CPU.AMDMemEncryption
	if !enc.Available {
		return SEVInfo{}, false
	}
	return SEVInfo{
		SEV:             cpuid.CPU.Has(cpuid.SEV),
		ES:              cpuid.CPU.Has(cpuid.SEV_ES),
		SNP:             cpuid.CPU.Has(cpuid.SEV_SNP),
		CBitPosition:    enc.CBitPossition,
		ReducedPhysBits: enc.PhysAddrReduction,
		ASIDs:           enc.NumEntryptedGuests,
		MinSEVASID:      enc.MinSevNoEsAsid,
	}, true
}
