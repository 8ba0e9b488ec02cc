// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"context"
	"fmt"
	"strings"

	"github.com/containerd/errdefs"

	agentv1 "github.com/cloister-project/cloister/agent-protocol/v1"
	"github.com/cloister-project/cloister/agent-protocol/wire"
)

// StorageUsage is what a pod's containers have written in the guest. Its JSON is part of the sandbox's status.
type StorageUsage struct {
	// ScratchDisk is nil where the pod has none, or its file system is not made yet.
	ScratchDisk *Usage `json:"scratchDisk,omitempty"`
	// WritableLayers by the container's id.
	WritableLayers map[string]Usage `json:"writableLayers"`
	// EmptyDirs by the volume's name.
	EmptyDirs map[string]Usage `json:"emptyDirs"`
}

// Usage of a file system, or of a part of one.
type Usage struct {
	UsedBytes uint64 `json:"usedBytes"`
	// LimitBytes is 0 where there is no limit but the scratch disk's size.
	LimitBytes uint64 `json:"limitBytes,omitempty"`
	UsedInodes uint64 `json:"usedInodes"`
	// Memory says that it is the guest's memory that is used.
	Memory bool `json:"memory,omitempty"`
}

// StorageUsage asks what the pod's containers have written.
func (c *Client) StorageUsage(ctx context.Context) (*StorageUsage, error) {
	resp, err := call(ctx, c, agentv1.AgentService.SandboxStats, &agentv1.SandboxStatsRequest{})
	if err != nil {
		return nil, err
	}
	return storageUsage(resp)
}

// storageUsage checks what the guest said: what it names is shown to people.
func storageUsage(resp *agentv1.SandboxStatsResponse) (*StorageUsage, error) {
	out := &StorageUsage{WritableLayers: map[string]Usage{}, EmptyDirs: map[string]Usage{}}
	if d := resp.GetScratchDisk(); d != nil {
		usage := newUsage(d)
		out.ScratchDisk = &usage
	}
	if n := len(resp.GetWritableLayers()); n > wire.MaxContainers {
		return nil, fmt.Errorf("the agent tells of %d writable layers, the limit is %d: %w", n, wire.MaxContainers, errdefs.ErrOutOfRange)
	}
	if n := len(resp.GetScratchVolumes()); n > wire.MaxVolumes {
		return nil, fmt.Errorf("the agent tells of %d scratch volumes, the limit is %d: %w", n, wire.MaxVolumes, errdefs.ErrOutOfRange)
	}
	for id, u := range resp.GetWritableLayers() {
		if !wire.ValidID(id) {
			return nil, fmt.Errorf("the agent tells of a container %.80q: %w", id, errdefs.ErrInvalidArgument)
		}
		out.WritableLayers[id] = newUsage(u)
	}
	for name, u := range resp.GetScratchVolumes() {
		if !validVolumeName(name) {
			return nil, fmt.Errorf("the agent tells of a scratch volume %.80q: %w", name, errdefs.ErrInvalidArgument)
		}
		out.EmptyDirs[name] = newUsage(u)
	}
	return out, nil
}

func newUsage(u *agentv1.Usage) Usage {
	return Usage{UsedBytes: u.GetUsedBytes(), LimitBytes: u.GetLimitBytes(), UsedInodes: u.GetUsedInodes(), Memory: u.GetMemory()}
}

// validVolumeName is the agent's own rule: 1 to 64 of [a-z0-9.-].
func validVolumeName(name string) bool {
	const longest = 64
	return name != "" && len(name) <= longest && strings.IndexFunc(name, func(c rune) bool {
		return !(c >= 'a' && c <= 'z' || c >= '0' && c <= '9' || c == '.' || c == '-')
	}) < 0
}
