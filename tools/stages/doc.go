// SPDX-License-Identifier: Apache-2.0

// Package stages shows what a long job does: each stage as it begins, with about how long it takes the first time, its
// output below it, its result and time as it ends, a sign of life in between, and a table of all at the end. `make run`
// prepares and does its job in two programs (tools/prepare, tools/mainjob); a [Record] is handed from one to the other.
//
// States: a stage runs from [Progress.Begin] to [Running.End], [Running.Fail] or [Running.Stop]. One may run in the
// foreground and any number in the background; lines of what they print are shown whole.
//
// Everything may be used concurrently; one lock orders what is written, and is held over a write to the output, for
// that is what it is for.
//
// It has the standard library alone: it is compiled before anything else is downloaded.
package stages
