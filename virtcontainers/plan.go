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
	// pidTarget is the container of the pod whose pid namespace it joins; empty for none.
	pidTarget string
}

// planContainer looks at a container's specification and at the host's files, and makes nothing. All that is refused is
// told at once. The pod is nil while it is not there yet.
func planContainer(spec *specs.Spec, cfg PodConfig, sharing mounts.Sharing, pod *Pod) (*containerPlan, error) {
	guestSpec, err := ocispec.Container(spec, cfg.Only != nil)
	reasons, fault := refusal.Reasons(err)
	if fault != nil {
		return nil, fault
	}
	target, more := pod.joined(spec.Linux)
	reasons = append(reasons, more...)
	all := mounts.Look(mounts.Plan(spec, sharing, cfg.OwnFiles), sharing)
	if err := refusal.Of(append(reasons, mounts.Refusals(all)...)); err != nil {
		return nil, err
	}
	return &containerPlan{spec: guestSpec, mounts: all, pidTarget: target}, nil
}
