// SPDX-License-Identifier: Apache-2.0

// Package version says which build of Cloister a binary is.
package version
