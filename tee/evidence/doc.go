// SPDX-License-Identifier: Apache-2.0

// Package evidence shows what is written in the evidence of a launch, an SEV-SNP attestation report or a TDX quote, by the
// names that reference values have, and compares the two.
//
// Evidence comes from whoever shows it. Nothing is verified here: not the signature, its certificates or the machine's TCB,
// nor that the evidence is fresh. What is read is bounded and checked in its form by the parsers (tee/snp/snpreport,
// tee/tdx), which have fuzz tests.
package evidence
