// SPDX-License-Identifier: Apache-2.0

// Package none is the platform of ordinary VMs: nothing of them is hidden from the host, and nothing is measured.
package none
