// SPDX-License-Identifier: Apache-2.0

// Package hypervisor describes a VM as a typed document and what a driver does with it.
//
// A Document is pure data: building one touches nothing, two can be compared, and each driver turns one into its own
// command line or API calls by a pure function that golden tests cover. Document.Validate has the rules that hold for
// every VMM; a Driver adds what its own has no room for. Drivers are in the packages below, qemu for example; package vmm
// picks one by its name; the vsock transports are in package vsock.
//
// Host side, outside the trust boundary of a confidential VM; what comes from the guest is hostile.
package hypervisor
