// SPDX-License-Identifier: Apache-2.0

// Package snpreport reads SEV-SNP attestation reports: SEV Secure Nested Paging Firmware ABI Specification (AMD 56860),
// MSG_REPORT_RSP, structure ATTESTATION_REPORT.
//
// A report comes from whoever shows it. Parse says what is written in it, after strict checks of its form; it does not
// check the signature, so that nothing in it is proven yet.
package snpreport
