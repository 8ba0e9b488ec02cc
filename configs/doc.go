// SPDX-License-Identifier: Apache-2.0

// Package configs holds Cloister's configuration: the commented base file cloister.toml (embedded in the binary), the
// snippets for containerd and Kubernetes, and the code that merges and checks them.
//
// # Layers
//
// From weak to strong; a stronger layer replaces single keys, never whole tables, and a list replaces a list:
//
//  1. the embedded cloister.toml, which has every key;
//  2. the file: containerd's ConfigPath, or /etc/cloister/cloister.toml where it exists;
//  3. config.d/*.toml in the directory of that file, in lexical order;
//  4. containerd's ConfigBody (the runtime handler's own [options] table), only where no ConfigPath is given;
//  5. annotations of the pod, and of these only the keys that annotations.allowed lists.
//
// A runtime handler picks its platform by layer 4: its options say tee.platform, all else about the platform is the node's.
// Tools that look at a platform do the same with Config.WithPlatform. platforms/ has a drop-in of each, for layer 3.
//
// # States and locks
//
// A Config is made once, by Load, FromOptions or ApplyAnnotations, and is never changed afterwards: all goroutines may
// read it without a lock. ApplyAnnotations returns a copy. Nobody may write to the slices inside.
//
// # Trust
//
// The files belong to the node's administrator, who is trusted on the host. Annotations are the pod author's: they
// change nothing unless listed (design rule 2), none of their keys names a file or a command, and their values pass the
// same checks as those in the files. Everything that is read has a limit of size.
//
// # Faults
//
// All faults of all layers are reported together, as the error value [Faults]. This package knows what a value of each key
// looks like; what the values of [tee] mean is judged where it is known (package tee/platform and those below it), by faults
// that name the same file, line and key (Config.Fault).
package configs
