// SPDX-License-Identifier: Apache-2.0

// Package launch finds out how the guest was launched, and whether that holds.
//
// A confidential guest knows that it is one by its kernel's command line, which the launch measures: the word
// cloister.tee=NAME. From it follow, before the agent says anything to the host: the hardware must be the one that is
// named; initdata must be what the launch bound, or absent where nothing was bound; what helps only a host to look into
// the guest must be absent. Whatever does not fit ends the guest: "not found" never means "not wanted".
//
// What is bound, and where: SNP has HOST_DATA and TDX MRCONFIGID, which the agent reads from the hardware's own report. A
// Secure Execution image carries the value on its sealed command line, as does the sample platform on an open one, which
// proves nothing.
package launch
