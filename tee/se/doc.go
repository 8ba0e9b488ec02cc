// SPDX-License-Identifier: Apache-2.0

// Package se is IBM Secure Execution for Linux as a platform, on s390x.
//
// Everything about such a VM is in its image (package image): kernel, initrd, command line, encrypted for the machines
// that may run it. The host hands over the image and can neither read nor exchange what is in it. There is no register
// that a launch writes: what names the VM is the image's header, its tag before all, and evidence (package attest) is
// computed over it.
//
// # Initdata
//
// The host cannot bind initdata at launch, so its owner binds it when the image is built: the sealed command line
// carries the digest of the one document that the agent accepts, and without it the agent accepts none. Prepare cannot see
// into the image; that a pod's document is the sealed one is found out by the agent, which stops if it is not. A pod with
// other initdata therefore needs another image. What the running guest accepted goes into the user data of its evidence
// as well, so that a verifier sees it without knowing how the image was built.
//
// # Host keys
//
// An image starts only on machines whose host key it has a slot for. Probe compares the slots with the hashes that the
// host's firmware shows, before a VM is made.
//
// Host side; packages image, hostkey and attest serve the owner's side.
package se
