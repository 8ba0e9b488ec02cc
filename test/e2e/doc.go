// SPDX-License-Identifier: Apache-2.0

// Package e2e tests Cloister end to end on real parts: containerd 2.4 with its CRI, ctr and nerdctl, QEMU, the guest
// image, everything as `make build guest` made it. The tests use only what users have: CRI, containerd's API and the
// command line tools.
//
// Tests that do not disturb containerd share one node ([sharedNode] in main_test.go); each makes its pods and removes
// them, and ends by looking for anything left. A test that failed, or that left something, takes its node with it: the next one
// gets a new node. Tests of faults have nodes of their own (harness.ForTest).
//
// A VM boots in 2 to 6 seconds under emulation, so what does not need a VM of its own shares a pod as subtests (TestPod). Nothing
// here asserts how long something takes, and nothing sleeps for something to happen: conditions are polled, with budget
// (helpers_test.go) as the time after which a condition is taken to never come true.
//
// All need root and a machine that is set up. Without they are skipped, or fail if CLOISTER_E2E=required (`make test`). What is
// in CLOISTER_E2E_DROPIN is laid over every node's cloister.toml: `make test-kvm` asks there for KVM and the kernel's vsock
// by name, so that nothing else can have been used.
package e2e
