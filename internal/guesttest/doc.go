// SPDX-License-Identifier: Apache-2.0

// Package guesttest makes the smallest guests that tests can boot: an initrd with one static Go program as its init, and the
// kernel's modules that it loads. The command init below it is the one that the tests of VMMs' drivers look around with.
package guesttest
