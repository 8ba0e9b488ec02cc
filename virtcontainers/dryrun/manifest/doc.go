// SPDX-License-Identifier: Apache-2.0

// Package manifest reads what counts for a VM of the manifest of a Kubernetes Pod: its class, its limits, its volumes and
// what it asks of the host. It looks at nothing but the text.
//
// # Trust
//
// A manifest is a file from somebody. Read and Parse bound its size and the number of things in it; names and paths are
// taken as they stand, and no file that one names is opened.
package manifest
