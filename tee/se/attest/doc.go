// SPDX-License-Identifier: Apache-2.0

// Package attest makes and checks evidence of IBM Secure Execution guests.
//
// The verifier starts: it makes a request (an attestation request control block, ARCB) that holds a fresh measurement
// key and nonce, encrypted for the machines that may run the guest. The guest hands it to the ultravisor with up to 256
// bytes of its own, the user data (ioctl UVIO_IOCTL_ATT of /dev/uv). The ultravisor opens the request and answers with
// an HMAC-SHA-512 under the measurement key over the header's digests and tag of the image that runs, the guest's
// configuration id, the user data, the nonce and what else was asked for. Only the verifier and that machine know the key.
// The verifier computes the same from the image's header, which it has.
//
// # What a good answer proves
//
//   - A machine with one of the request's host keys runs the image with this header, and it was asked after the request
//     was made. What the image holds, its command line and the initdata digest in it included, was fixed when it was
//     built: with the builder's word for it, or an image that is built anew from the same keys, the tag says all.
//   - The user data comes from that guest. Whoever asks in the guest puts UserData there: the digest of the initdata document that
//     it accepted when it started, or zeros for none. So a verifier learns which document the running guest obeys from
//     the guest itself, without knowing what was sealed.
//   - With ImageHostKey and AttestHostKey, which machine it was.
//
// It does not prove when the guest started, nor that it is the only one of its image: the host can start an image as often
// as it likes, which the configuration id tells apart.
//
// Runs on the verifier's side and in the guest. Requests are hostile to the machine, answers to the verifier: every field
// is checked against its limit before use.
package attest
