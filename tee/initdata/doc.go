// SPDX-License-Identifier: Apache-2.0

// Package initdata reads and writes initdata: a TOML document that a workload's owner hands to a guest through the
// untrusted host, bound to the guest's launch by its digest.
//
// It has three forms: the TOML text itself, the pod annotation (base64 of gzip of the text), and the disk that carries it
// into the guest (magic, length, gzip, padding). The digest is of the TOML text as it is, byte by byte. The register that
// binds it differs from platform to platform in size; Bind fits a digest to it.
//
// Both sides of the trust boundary use it: on the host it keeps nonsense from a launch, in the guest it reads what a
// hostile host made. Every size has a limit.
package initdata
