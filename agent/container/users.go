// SPDX-License-Identifier: Apache-2.0

package container

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/cloister-project/cloister/internal/idmap"
)

// join opens what a container shares with others of the pod: the user namespace with its map, ids, none if it has no user namespace;
// and, with pid, the pod's pid namespace. Both are made for the first container that needs them: only then is the map known, and
// a container can see processes (mount /proc) only of a pid namespace that belongs to its user namespace.
func (m *Manager) join(ctx context.Context, ids idmap.Map, pid bool) (users, processes *os.File, err error) {
	m.mu.Lock()
	p := m.pod
	m.mu.Unlock()
	pid = pid && p.sharedPID
	if ids.IsZero() && !pid {
		return nil, nil, nil
	}
	select {
	case p.turn <- struct{}{}:
		defer func() { <-p.turn }()
	case <-p.gone:
		return nil, nil, errShutsDown()
	case <-ctx.Done():
		return nil, nil, context.Cause(ctx)
	}
	if !ids.IsZero() && p.users[ids] == nil {
		if p.users[ids], err = ids.Open(); err != nil {
			return nil, nil, err
		}
	}
	users = p.users[ids]
	if !pid {
		return users, nil, nil
	}
	if p.pid == nil {
		if err := p.startPause(filepath.Join(m.cfg.StateDir, "pod"), m.cfg.Cgroup+pauseSuffix, users); err != nil {
			return nil, nil, fmt.Errorf("start the pause process of the pod's pid namespace: %w", err)
		}
		p.pidIDs = ids
	}
	if !ids.IsZero() && ids != p.pidIDs {
		return nil, nil, fmt.Errorf("the pod's pid namespace is of containers with another user namespace: %w", errdefs.ErrFailedPrecondition)
	}
	return users, p.pid, nil
}

// idsOf is the map of the user namespace that a specification of the host's asks for; none if it asks for none.
func idsOf(in *specs.Spec) idmap.Map {
	if in.Linux == nil || !slices.ContainsFunc(in.Linux.Namespaces, func(ns specs.LinuxNamespace) bool {
		return ns.Type == specs.UserNamespace
	}) {
		return idmap.Map{}
	}
	return idmap.Of(in.Linux.UIDMappings, in.Linux.GIDMappings)
}
