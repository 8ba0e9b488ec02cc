// SPDX-License-Identifier: Apache-2.0

// Package abi has what every part of Cloister must agree on about the platforms: their names, and the bits and sizes of
// the hardware's interfaces that more than one package reads or writes.
//
// It is the only package of tee that both sides of the trust boundary import besides initdata and report, and it holds
// constants and nothing that decides: configs checks syntax, each platform's package (tee/snp, tee/tdx, ...) the meaning,
// and the guest's agent (agent/launch) enforces its own rules, whatever the host's side says. It imports nothing of
// Cloister, so that everything can import it.
package abi
