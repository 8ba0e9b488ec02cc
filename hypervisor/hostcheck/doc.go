// SPDX-License-Identifier: Apache-2.0

// Package hostcheck looks at the host before a VMM is started, for what every driver must know in the same way: whether KVM
// is there and real, what the files that a document names are, and whether a VM of its size has room. It changes nothing.
package hostcheck
