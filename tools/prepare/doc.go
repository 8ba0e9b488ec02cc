// SPDX-License-Identifier: Apache-2.0

// Command prepare is the first half of `make run`: it sets the machine up and builds what the main job needs, and no
// more; then it becomes tools/mainjob. The rest is for `make setup` and `make peers`, which `make test` calls.
//
// What it does are targets of the Makefile and tools/conformance/build. It orders them: the package manager and module
// downloads run in the background from the start, and one compilation at a time beside them, since a compilation uses
// all cores by itself.
//
// A step that fails ends all others, and is named, with all that it printed. So does a signal: every program is started
// in a process group of its own, and prepare waits until the group is empty.
//
// It imports the standard library only, so that it is compiled in seconds and has nothing to download itself.
package main
