// SPDX-License-Identifier: Apache-2.0

package virtcontainers

import (
	"github.com/cloister-project/cloister/tee/platform"
	"github.com/cloister-project/cloister/virtcontainers/vmplan"
)

// CheckPod checks a pod as NewPod does before it touches anything, and returns the plan of its VM, for tools that do not
// start it. The plan keeps nothing of what it finds out. A pod that asks for what a VM cannot give is refused with a
// refusal.Error.
func CheckPod(cfg PodConfig, options platform.Options) (*vmplan.Plan, error) {
	return checkPod(cfg, vmplan.Pod{Options: options})
}
