// SPDX-License-Identifier: Apache-2.0

package main

import "slices"

// step is a command that is run to its end.
type step struct {
	name string
	// estimate says how long it takes on a machine of two cores.
	estimate string
	command  []string
	// after names the background steps that must have ended before.
	after []string
	// background steps run beside all others. Their output is shown if they fail; with show, as it comes, too.
	background, show bool
}

const (
	stepBootstrap = "build what shows this"
	stepSetup     = "set the machine up"
	stepFetchOwn  = "download Cloister's modules"
	stepFetchPeer = "download containerd's modules"
	stepFetchKeep = "download the modules of crictl and nerdctl"
)

// Handlers that need more than Cloister's default one, by the names that test/harness gives them.
const (
	handlerErofs = "cloister-erofs"
	handlerRunc  = "runc"
)

// Binaries of tools/conformance. The main job needs the first ones; a node that is kept is looked at with the second
// ones; and the last ones are runc's.
var (
	peers     = []string{"containerd", "ctr", "bridge", "host-local", "loopback", "portmap"}
	peersKeep = []string{"crictl", "nerdctl"}
	peersRunc = []string{"containerd-shim-runc-v2", "runc"}
)

// plan lists what the main job needs with a runtime handler ("": cloister), background steps first. If Cloister was
// built before, of whatever version, its modules have been downloaded, and what a newer version lacks is left to the
// compilation. Where nothing can be downloaded before the machine is set up, for want of certificates, downloads wait for it.
func plan(handler string, keep, builtBefore, certificates bool) []step {
	target := func(name string) []string { return []string{"make", "--no-print-directory", name} }
	fetch := func(names []string) []string { return append([]string{"tools/conformance/build", "--fetch"}, names...) }
	build := func(names []string) []string { return append([]string{"tools/conformance/build"}, names...) }

	setup := target("setup-run")
	if handler == handlerErofs {
		setup = target("setup")
	}
	steps := []step{{name: stepSetup, estimate: "about 1 min the first time", command: setup, background: true, show: true}}

	var afterOwn, beforeFetch []string
	if !certificates {
		beforeFetch = []string{stepSetup}
	}
	if !builtBefore {
		steps = append(steps, step{name: stepFetchOwn, estimate: "about 20 s the first time", command: target("modules"),
			after: beforeFetch, background: true})
		afterOwn = []string{stepFetchOwn}
	}
	names, afterPeers := peers, []string{stepFetchPeer}
	if handler == handlerRunc {
		names = slices.Concat(peers, peersRunc)
		afterPeers = append(afterPeers, stepSetup) // runc needs libseccomp
	}
	steps = append(steps, step{name: stepFetchPeer, estimate: "about 20 s the first time", command: fetch(names),
		after: beforeFetch, background: true})
	if keep {
		steps = append(steps, step{name: stepFetchKeep, estimate: "about 1 min the first time",
			command: fetch(peersKeep), after: []string{stepFetchPeer}, background: true})
	}

	steps = append(steps, step{name: "build the main job", estimate: "20 to 50 s the first time", command: target("mainjob"), after: afterOwn})
	if handler != handlerRunc {
		steps = append(steps, step{name: "build shim and operator's tool", estimate: "about 20 s the first time",
			command: target("build-host"), after: afterOwn})
	}
	steps = append(steps, step{name: "build containerd, ctr and CNI plug-ins", estimate: "1 to 2 min the first time",
		command: build(names), after: afterPeers})
	if handler != handlerRunc {
		steps = append(steps, step{name: "build agent and guest image", estimate: "about 20 s the first time",
			command: target("guest"), after: []string{stepSetup}})
	}
	if keep {
		steps = append(steps, step{name: "build crictl and nerdctl", estimate: "2 to 4 min the first time",
			command: build(peersKeep), after: []string{stepFetchKeep}})
	}
	return steps
}
