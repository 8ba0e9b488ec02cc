// SPDX-License-Identifier: Apache-2.0

// Package refusal is the error that lists everything that a pod or container asks for and cannot have, so that people
// hear all of it at once. Whoever finds a reason adds it to a list; the list becomes one Error in the end.
package refusal
