// SPDX-License-Identifier: Apache-2.0

package storage

import (
	"path/filepath"
	"strconv"

	"github.com/containerd/log"
	"golang.org/x/sys/unix"

	agentv1 "github.com/cloister-project/cloister/agent-protocol/v1"
)

// Usage fills in what the pod's containers have written: the scratch disk, writable layers and scratch volumes. It looks, and
// waits for nothing: what is being made or removed is left out.
func (s *Store) Usage(out *agentv1.SandboxStatsResponse) {
	s.mu.Lock()
	disk := ""
	if s.disk != nil && isClosed(s.disk.ready) && s.disk.err == nil {
		disk = s.disk.path
	}
	layers, volumes := map[string]string{}, map[string]string{}
	for id, c := range s.containers {
		if c.writable != "" {
			layers[id] = c.writable
		}
	}
	for name, v := range s.scratch {
		if isClosed(v.made) && v.err == nil {
			volumes[name] = v.path
		}
	}
	s.mu.Unlock()

	if disk != "" {
		usage, err := usageOfFS(disk)
		if err != nil {
			log.L.WithError(err).Warn("the usage of the scratch disk is not known")
		}
		out.ScratchDisk = usage
	}
	out.WritableLayers, out.ScratchVolumes = usages(disk, layers), usages(disk, volumes)
}

// usages looks at places, by what they are of.
func usages(disk string, places map[string]string) map[string]*agentv1.Usage {
	out := map[string]*agentv1.Usage{}
	for key, path := range places {
		usage, err := usageOf(disk, path)
		if err != nil {
			log.L.WithError(err).WithField("of", key).Debug("usage is not known")
			continue
		}
		out[key] = usage
	}
	return out
}

// usageOf looks at a tree of the scratch disk, or at a tmpfs.
func usageOf(disk, path string) (*agentv1.Usage, error) {
	if disk == "" || filepath.Dir(path) != disk {
		usage, err := usageOfFS(path)
		if err != nil {
			return nil, err
		}
		usage.Memory = true
		return usage, nil
	}
	project, err := strconv.ParseUint(filepath.Base(path), 10, 32) // as onDisk names it
	if err != nil {
		return nil, err
	}
	q, err := treeQuota(path, uint32(project))
	if err != nil {
		return nil, err
	}
	return &agentv1.Usage{UsedBytes: q.space, LimitBytes: q.blockHard * quotaBlock, UsedInodes: q.inodes}, nil
}

func usageOfFS(path string) (*agentv1.Usage, error) {
	var stat unix.Statfs_t
	if err := unix.Statfs(path, &stat); err != nil {
		return nil, err
	}
	block := uint64(stat.Bsize)
	return &agentv1.Usage{
		UsedBytes: (stat.Blocks - stat.Bfree) * block, LimitBytes: stat.Blocks * block, UsedInodes: stat.Files - stat.Ffree,
	}, nil
}

// setWritable notes where a container's writable layer is.
func (s *Store) setWritable(c *container, path string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	c.writable = path
}

func isClosed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}
