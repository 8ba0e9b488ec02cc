// SPDX-License-Identifier: Apache-2.0

// Package contract holds the law of hypervisor.Driver and hypervisor.VM as tests, which every VMM's driver must pass with a real
// guest. It knows a VMM by its name alone: the driver comes from package vmm, and nothing but the two interfaces is used, and the
// console's log in the state directory. What is special to one VMM is tested in its driver's package.
//
// The environment says which VMM and what runs the guest; package vmtest names the rest, and a test that lacks something is
// skipped with the reason:
//
//	CLOISTER_TEST_VMM         qemu, which is the default, or cloudhypervisor
//	CLOISTER_TEST_ACCEL       tcg or kvm; without it the first of them that the VMM has
//	CLOISTER_TEST_QEMU        the path of QEMU; without it the driver looks for one, as it does for any other VMM
//	CLOISTER_TEST_VIRTIOFSD   the path of virtiofsd
package contract
