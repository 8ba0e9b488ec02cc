// SPDX-License-Identifier: Apache-2.0

// Package guesttest makes the smallest guest that tests can boot: an initrd with one static Go program as its init.
package guesttest
