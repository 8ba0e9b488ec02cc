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

// userNamespace is one that containers join. The path is a link to nsPath's: of a path below /proc/PID libcontainer takes the map of the
// process for the namespace's (runc 1.5, libcontainer/internal/userns).
type userNamespace struct {
	file *os.File
	path string
}

// join returns paths of what a container shares with others of the pod, empty for what it does not: the user namespace with its map,
// ids, and with pid the pod's pid namespace. Both are made for the first container that needs them: only then is the map known, and
// a container can see processes (mount /proc) only of a pid namespace that belongs to its user namespace.
func (m *Manager) join(ctx context.Context, ids idmap.Map, pid bool) (users, processes string, err error) {
	m.mu.Lock()
	p := m.pod
	m.mu.Unlock()
	if ids.IsZero() && !pid {
		return "", "", nil
	}
	select {
	case p.turn <- struct{}{}:
		defer func() { <-p.turn }()
	case <-p.gone:
		return "", "", errShutsDown()
	case <-ctx.Done():
		return "", "", context.Cause(ctx)
	}
	if !ids.IsZero() {
		if users, err = p.userNamespace(ids, m.cfg.StateDir); err != nil {
			return "", "", err
		}
	}
	if !pid {
		return users, "", nil
	}
	if p.pid == nil {
		if err := p.startPause(filepath.Join(m.cfg.StateDir, "pod"), m.cfg.Cgroup+pauseSuffix, users); err != nil {
			return "", "", fmt.Errorf("start the pause process of the pod's pid namespace: %w", err)
		}
		p.pidIDs = ids
	}
	if !ids.IsZero() && ids != p.pidIDs {
		return "", "", fmt.Errorf("the pod's pid namespace is of containers with another user namespace: %w", errdefs.ErrFailedPrecondition)
	}
	return users, nsPath(p.pid), nil
}

// userNamespace returns the path of the namespace with a map, which it makes unless there is one.
func (p *pod) userNamespace(ids idmap.Map, stateDir string) (string, error) {
	if u, ok := p.users[ids]; ok {
		return u.path, nil
	}
	file, err := ids.Open()
	if err != nil {
		return "", err
	}
	u := userNamespace{file, filepath.Join(stateDir, fmt.Sprintf("users-%d", len(p.users)))}
	if err := os.Symlink(nsPath(file), u.path); err != nil {
		_ = file.Close()
		return "", err
	}
	p.users[ids] = u
	return u.path, nil
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
