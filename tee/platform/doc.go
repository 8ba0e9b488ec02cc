// SPDX-License-Identifier: Apache-2.0

// Package platform picks a platform of package tee by the name in the configuration, and holds the rules about a
// configuration that are the same for all confidential platforms. There is no choice by what the host offers: a node that
// lacks what is named fails the pod.
//
// Who judges what: package configs knows the keys and what a value of each looks like; the platform's own package knows
// what its values mean; this package knows what no confidential platform may be combined with. All name the key at fault,
// and here the faults get the file and line that set it.
package platform
