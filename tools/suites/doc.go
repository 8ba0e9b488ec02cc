// SPDX-License-Identifier: Apache-2.0

// Command suites runs the test suites that others wrote for container runtimes against a private containerd with
// Cloister, and the same with runc, so that what differs is known to be Cloister's:
//
//	critest           the CRI's validation suite (cri-tools), with sandboxer = "shim"
//	critest-classic   the same with sandboxer = "podsandbox"
//	cri-integration   containerd's integration suite of its CRI plugin
//	client            containerd's integration suite of its client, which is about tasks
//
// Their binaries come from tools/conformance/build, their images from a root file system that tools/setup makes out of
// Debian's packages; a registry on the loopback device of the node's network namespace stands for all registries.
//
// What a suite says about each of its specs is written as JSON, one file for runc and one for Cloister. The table that
// docs/conformance.md has is made of both. A spec that passes with runc and not with Cloister has to be in the table of
// docs/limits.md with its reason, and a spec in that table has to fail: else the run fails.
//
// Nothing inside the suites is changed, their time limits neither.
package main
