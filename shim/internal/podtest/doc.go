// SPDX-License-Identifier: Apache-2.0

// Package podtest has pods without VMs for the tests of shim's services. They keep the promises of package
// virtcontainers and no others: a pod that ends ends its processes, in any order; Delete refuses what runs. Tests make
// their processes exit.
package podtest
