// SPDX-License-Identifier: Apache-2.0

// Package igvmtest makes IGVM files for tests, good ones and others.
package igvmtest
