// SPDX-License-Identifier: Apache-2.0

// Package mountstest runs a package's tests in a mount namespace of their own, so that nothing stays mounted, and no loop
// device in use, whatever happens.
package mountstest
