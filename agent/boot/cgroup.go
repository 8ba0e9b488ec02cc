// SPDX-License-Identifier: Apache-2.0

package boot

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// Cgroups of the guest, all version 2.
const (
	cgroupRoot = "/sys/fs/cgroup"
	// AgentCgroup holds the agent alone, PodCgroup the containers, each in a child of its own.
	AgentCgroup = "/agent"
	PodCgroup   = "/pod"
)

// setupCgroups hands every controller down to the pod's cgroup and puts the agent into its own, so that the pod's sums
// do not count the agent.
func setupCgroups(root string) error {
	names, err := os.ReadFile(filepath.Join(root, "cgroup.controllers"))
	if err != nil {
		return fmt.Errorf("read the cgroup controllers: %w", err)
	}
	var enable strings.Builder
	for _, name := range strings.Fields(string(names)) {
		fmt.Fprintf(&enable, "+%s ", name)
	}
	for _, dir := range []string{AgentCgroup, PodCgroup} {
		if err := os.Mkdir(filepath.Join(root, dir), 0o755); err != nil && !os.IsExist(err) {
			return fmt.Errorf("make a cgroup: %w", err)
		}
	}
	// The process leaves the root before its controllers are handed down, else it would hold some of them back.
	if err := os.WriteFile(filepath.Join(root, AgentCgroup, "cgroup.procs"), []byte("0"), 0); err != nil {
		return fmt.Errorf("move the agent into its cgroup: %w", err)
	}
	for _, dir := range []string{"", PodCgroup} {
		if err := os.WriteFile(filepath.Join(root, dir, "cgroup.subtree_control"), []byte(enable.String()), 0); err != nil {
			return fmt.Errorf("hand down cgroup controllers %s: %w", enable.String(), err)
		}
	}
	return nil
}
