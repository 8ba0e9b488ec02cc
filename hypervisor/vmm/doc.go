// SPDX-License-Identifier: Apache-2.0

// Package vmm picks the driver of a VMM by the name in the configuration (hypervisor.kind). It is to drivers what package
// tee/platform is to platforms: the one place that knows all of them.
package vmm
