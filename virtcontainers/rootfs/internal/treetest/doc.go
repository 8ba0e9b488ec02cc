// SPDX-License-Identifier: Apache-2.0

// Package treetest helps tests to make directory trees with every kind of file, to mount images and to compare trees.
package treetest
