// SPDX-License-Identifier: Apache-2.0

// Package hostprobe reads what a host says about itself: CPUID, /dev/kvm, module parameters, /proc/cpuinfo, the misc
// cgroup. The platforms' probes are made of it. It changes nothing and starts nothing.
//
// Files are looked up below Host.Root, so that a test shows a tree of files in place of a machine. CPUID alone has no such
// tree. All of it is host side: what is read here decides whether a launch is tried, never whether a guest is trusted.
package hostprobe
