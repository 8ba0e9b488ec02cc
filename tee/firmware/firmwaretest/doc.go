// SPDX-License-Identifier: Apache-2.0

// Package firmwaretest builds small firmware images for tests. They have the tables of a real one and no code.
package firmwaretest
