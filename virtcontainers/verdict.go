// SPDX-License-Identifier: Apache-2.0

package virtcontainers

import (
	"path/filepath"
	"slices"

	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/cloister-project/cloister/configs"
	"github.com/cloister-project/cloister/tee/platform"
	"github.com/cloister-project/cloister/virtcontainers/vmplan"
	"github.com/cloister-project/cloister/virtcontainers/volumes"
)

// What a pod's start would do, for tools that do not start it.

// CheckPod checks a pod as NewPod does before it touches anything, and returns the plan of its VM. The plan keeps nothing
// of what it finds out. A pod that asks for what a VM cannot give is refused with a RefusedError.
func CheckPod(cfg PodConfig, options platform.Options) (*vmplan.Plan, error) {
	return checkPod(cfg, vmplan.Pod{Options: options})
}

// Outcome is what becomes of a mount in a pod.
type Outcome string

// Outcomes.
const (
	MountShared  Outcome = "shared"
	MountCopied  Outcome = "copied"
	MountScratch Outcome = "guest memory"
	MountRefused Outcome = "refused"
)

// MountOutcome returns what would become of a container's mount, as far as its words tell: the host is not looked at. The
// detail is for people; of a mount that is refused it is the reason.
func MountOutcome(cfg *configs.Config, m specs.Mount) (outcome Outcome, detail string) {
	why := apart(cfg)
	if reason := checkMount(m); reason != "" {
		return MountRefused, reason
	}
	if !isLive(m) {
		if slices.Contains(podFiles, filepath.Clean(m.Destination)) {
			return MountCopied, "sent to the guest once, when its container is made"
		}
		return MountScratch, "made by the guest"
	}
	if why == "" {
		return MountShared, "a directory or file of the host, which the VM reads and writes live (virtio-fs)"
	}
	if reason := refuseLive(m, why); reason != "" {
		return MountRefused, reason
	}
	switch volumes.Parse(m.Source).Kind {
	case volumes.Copied:
		return MountCopied, "sent to the guest file by file, changes too; read-only"
	case volumes.SubPath, volumes.TerminationLog:
		return MountCopied, "sent to the guest once, when its container is made"
	}
	return MountScratch, "made by the guest; the host never sees what is in it"
}
