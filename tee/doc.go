// SPDX-License-Identifier: Apache-2.0

// Package tee says what a platform is, that a VM can be launched on, and what each of them has to do. Their names are in
// package tee/abi, the platforms in the packages below, one each; package tee/platform picks one by its name.
//
// A platform does four things. It probes a host; it adds itself to a VM's document; it predicts the launch measurement
// from the same document, so that what is measured and what is started cannot differ; and it refuses what would weaken
// it. What others must know of it they ask by the traits of Platform (its CPU model, whether the host can read such a VM,
// what the words of a failed launch mean), so that nobody else switches on a name. Nothing falls back to another platform: a
// node that lacks what a pod asks for fails the pod with what is missing.
//
// Host side, except for packages tee/abi, tee/initdata and tee/report, which the guest's agent uses too. Nothing here is trusted by
// the guest because the host says it: what counts is what the hardware measures.
package tee
