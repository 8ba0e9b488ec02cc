// SPDX-License-Identifier: Apache-2.0

// Package hostkey handles the public keys of IBM Z and LinuxONE machines that run Secure Execution guests: their
// documents, which are X.509 certificates, and the slots that hand a secret to one such machine.
//
// Whoever builds an image or an attestation request trusts each key that it has a slot for with all secrets in it. A
// Verifier therefore accepts a document only with a complete proof out of files that its caller chose: a root that the
// caller trusts, the certificates below it down to IBM's key signing service, and a revocation list for each of them.
// Nothing is fetched and nothing of the system's own trust store is used.
//
// Runs where images are built and evidence is checked, on the owner's side; documents and lists are hostile input until
// they are verified.
package hostkey
