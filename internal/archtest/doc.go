// SPDX-License-Identifier: Apache-2.0

// Package archtest holds the rules of the source tree that the compiler does not check: which package may import
// which, and how long a file may be. It has tests only.
package archtest
