// SPDX-License-Identifier: Apache-2.0

package dryrun

import (
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/cloister-project/cloister/virtcontainers/mounts"
)

// Outcome is what becomes of a volume in a pod.
type Outcome string

// Outcomes.
const (
	Shared  Outcome = "shared"
	Copied  Outcome = "copied"
	InGuest Outcome = "in the guest"
	Refused Outcome = "refused"
	// Unused is what becomes of a volume that no container mounts.
	Unused Outcome = "nothing"
)

// outcomeOf returns what would become of a container's mount, by the classification with which a pod is started; the host is
// not looked at. The detail is for people; of a mount that is refused it is the reason.
func outcomeOf(m specs.Mount, s mounts.Sharing) (outcome Outcome, detail string) {
	switch planned := mounts.Classify(m, s); planned.Kind {
	case mounts.Refused:
		return Refused, planned.Reason
	case mounts.Live:
		return Shared, "a directory or file of the host, which the VM reads and writes live (virtio-fs)"
	case mounts.Copied:
		return Copied, "sent to the guest file by file, changes too; read-only"
	case mounts.Part, mounts.TerminationLog, mounts.PodFile:
		return Copied, "sent to the guest once, when its container is made"
	case mounts.Scratch, mounts.ImageVolume:
		if s.Live() {
			return InGuest, "made by the guest, on the pod's scratch disk or in its memory"
		}
		return InGuest, "made by the guest, on its encrypted scratch disk or in its memory; the host never sees what is in it"
	}
	return InGuest, "made by the guest"
}
