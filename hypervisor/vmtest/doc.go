// SPDX-License-Identifier: Apache-2.0

// Package vmtest is for tests that start real VMs by a hypervisor.Driver: the guest, a document for it, and a VM whose console
// is waited for and which must leave nothing. It knows no single VMM. Package hypervisor/contract has the tests that every
// driver must pass; a driver's own tests use it for what only that VMM has.
//
// What the tests boot is named in the environment; a test that lacks it is skipped:
//
//	CLOISTER_TEST_KERNEL, _MODULES               a bzImage, and a directory like lib/modules/<release>
//	CLOISTER_TEST_S390X_KERNEL, _S390X_MODULES   the same for emulated s390x guests; the kernel is a raw image
//	CLOISTER_TEST_ACCEL                          what runs amd64 guests: "tcg", which is the default, or "kvm"
package vmtest
