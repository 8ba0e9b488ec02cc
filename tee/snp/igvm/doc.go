// SPDX-License-Identifier: Apache-2.0

// Package igvm reads IGVM files (Independent Guest Virtual Machine) for SEV-SNP: the guest's first pages, and the first
// registers of each virtual CPU, which a VMM loads as they stand.
//
// Only what Cloud Hypervisor loads is accepted, so that nothing is in a file whose effect on the launch measurement is not
// known: version 1 of the format, pages of 4 KiB, no relocation, no ID block.
//
// The files come from the node's administrator and are accepted by their digest before anything is made of them. They are read
// with strict limits all the same. Nothing here has a state.
//
// Source: github.com/microsoft/igvm, igvm_defs (the format); Cloud Hypervisor v53, vmm/src/igvm/igvm_loader.rs (what is loaded).
package igvm
