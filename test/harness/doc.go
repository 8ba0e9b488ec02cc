// SPDX-License-Identifier: Apache-2.0

// Package harness runs a private containerd for end-to-end tests, the main job and the benchmarks.
//
// A [Node] is one containerd 2.4 with everything that belongs to it (root, state, sockets, CNI configuration, logs,
// Cloister's own configuration and state) below one directory, /var/tmp/clXXXXXX, and with a network namespace of the same
// name in which containerd, its shims and its CNI plugins run. Nothing of the machine's own containerd, network or
// configuration is touched. These runtime handlers are there:
//
//	cloister          sandboxer = "shim", overlayfs
//	cloister-erofs    sandboxer = "shim", the EROFS snapshotter
//	cloister-classic  sandboxer = "podsandbox", overlayfs
//	cloister-sample   as the first, with the rules of a confidential VM and no hardware behind them
//	cloister-options  the same, by containerd's options instead of a configuration of its own
//	cloister-s390x    as the first, in guests of another architecture, emulated
//	cloister-sealed   both, for guests out of a sealed image
//	runc              the baseline
//
// Images are made here from Debian's busybox-static ([Busybox], [Empty], [Deep], or an [Image] of one's own) and
// imported; no registry is needed. [CRI] is a thin client of containerd's CRI; [Node.Ctr], [Node.Crictl] and
// [Node.Nerdctl] prepare the command line tools to talk to the node.
//
// [Node.Leaks] compares what a node has now (processes, links, mounts, network namespaces, cgroups, sockets, files,
// loop devices) with what it had when it was started; every end-to-end test ends with it. See leaks.go for what counts.
//
// States: a Node is started by [Start], containerd in it may be stopped and started again any number of times
// ([Node.StopContainerd], [Node.StartContainerd]), and [Node.Stop] ends it: every process it started is killed by pid,
// mounts and the namespace are undone, the directory is removed. Stop may be repeated. Each node is registered in the
// cache's nodes directory while it lives, so that `make stop` finds nodes that were kept or whose owner was killed.
//
// A Node is for one goroutine where it starts and stops; everything else may be used concurrently.
package harness
