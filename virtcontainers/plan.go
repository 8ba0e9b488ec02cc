// SPDX-License-Identifier: Apache-2.0

package virtcontainers

import (
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/cloister-project/cloister/virtcontainers/mounts"
	"github.com/cloister-project/cloister/virtcontainers/ocispec"
	"github.com/cloister-project/cloister/virtcontainers/refusal"
)

// containerPlan is a container's OCI specification, split into what the guest gets and what the host does about it.
type containerPlan struct {
	// spec in JSON, as the agent gets it.
	spec   []byte
	mounts []mounts.Mount
}

// planContainer looks at a container's specification and at the host's files, and makes nothing. All that is refused is
// told at once.
func planContainer(spec *specs.Spec, pod PodConfig, sharing mounts.Sharing) (*containerPlan, error) {
	guestSpec, err := ocispec.Container(spec, pod.Only != nil)
	reasons, fault := refusal.Reasons(err)
	if fault != nil {
		return nil, fault
	}
	all := mounts.Look(mounts.Plan(spec, sharing, pod.OwnFiles), sharing)
	if err := refusal.Of(append(reasons, mounts.Refusals(all)...)); err != nil {
		return nil, err
	}
	return &containerPlan{spec: guestSpec, mounts: all}, nil
}
