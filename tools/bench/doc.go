// SPDX-License-Identifier: Apache-2.0

// Command bench measures Cloister's budgets and prints them as a table; `make bench` runs it.
//
//	bench [-rounds N | -quick] [-only STEP] [-out DIR] [-strict]
//
// It starts a private containerd (package test/harness) and measures everything in one run, each figure beside its
// baseline and taking turns with it (ours, baseline, ours, baseline …), so that what else the machine does strikes both.
// What is compared are medians. DIR (bin) gets bench.json, with every sample, and bench.md.
//
// The baselines are
//
//   - bare QEMU: the same kernel image on the same machine type, accelerator, CPU model and memory, with no device but
//     a serial line, and an initrd that holds a program of 18 instructions (emptyinit.go). The clock runs from exec to
//     the first byte of that program.
//   - runc, in the same containerd, called the same way.
//   - the probe (probe.go, probeguest.go): a VM like a pod's, started by the same driver with the same devices, whose
//     init is this program itself. It is the far end of raw vsock streams, and reads the disk without a file system.
//
// A figure that cannot be taken leaves its row in the table with the reason, and makes the run fail. A budget that is
// not met does so only with -strict: budgets are goals, and docs/performance.md says what is done about each.
package main
