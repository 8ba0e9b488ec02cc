// SPDX-License-Identifier: Apache-2.0

package ocispec

import (
	"fmt"
	"path"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/cloister-project/cloister/agent-protocol/wire"
)

// Container builds the configuration that libcontainer gets. It copies what is allowed from in, field by field,
// refuses what would change the container's meaning or reach into the guest, and drops what only describes the host.
// Root and mounts are filled in by the caller from the guest's own storage.
func (g *Guest) Container(id string, in *specs.Spec, terminal bool) (*specs.Spec, error) {
	switch {
	case in.Process == nil:
		return nil, refused("spec has no process")
	case in.Linux == nil:
		return nil, refused("spec has no linux section")
	case in.Hooks != nil && hooksCount(in.Hooks) > 0:
		return nil, refused("spec has hooks: the guest runs none")
	case len(in.Mounts) > 0:
		return nil, refused("spec has mounts: they belong into the request")
	case in.Windows != nil || in.Solaris != nil || in.VM != nil || in.ZOS != nil || in.FreeBSD != nil:
		return nil, refused("spec is not for Linux")
	}
	process, err := g.Process(in.Process, terminal)
	if err != nil {
		return nil, err
	}
	linux, err := g.linuxSpec(id, in.Linux)
	if err != nil {
		return nil, err
	}
	out := &specs.Spec{
		Version: specs.Version,
		Process: process,
		Root:    &specs.Root{Readonly: in.Root != nil && in.Root.Readonly},
		Linux:   linux,
	}
	if OwnNamespace(linux, specs.UTSNamespace) {
		// In the pod's own UTS namespace the name is the pod's, and one container must not change it.
		out.Hostname, out.Domainname = in.Hostname, in.Domainname
	}
	return out, nil
}

func hooksCount(h *specs.Hooks) int {
	//lint:ignore SA1019 Prestart hooks are deprecated, and refused like the others
	return len(h.Prestart) + len(h.CreateRuntime) + len(h.CreateContainer) + len(h.StartContainer) + len(h.Poststart) + len(h.Poststop)
}

// OwnNamespace reports whether l gives the container a namespace of its own of type t.
func OwnNamespace(l *specs.Linux, t specs.LinuxNamespaceType) bool {
	return slices.ContainsFunc(l.Namespaces, func(n specs.LinuxNamespace) bool { return n.Type == t && n.Path == "" })
}

// OwnPID reports whether a specification of the host's, not checked yet, asks for a pid namespace of the container's own.
func OwnPID(in *specs.Spec) bool {
	return in.Linux != nil && OwnNamespace(in.Linux, specs.PIDNamespace)
}

// JoinsPID reports whether a specification of the host's, not checked yet, joins a pid namespace that exists.
func JoinsPID(in *specs.Spec) bool {
	return in.Linux != nil && slices.ContainsFunc(in.Linux.Namespaces, func(n specs.LinuxNamespace) bool {
		return n.Type == specs.PIDNamespace && n.Path != ""
	})
}

func (g *Guest) linuxSpec(id string, in *specs.Linux) (*specs.Linux, error) {
	switch {
	case len(in.NetDevices) > 0:
		return nil, refused("linux.netDevices: network devices are the pod's")
	case len(in.TimeOffsets) > 0:
		return nil, refused("linux.timeOffsets: the guest has no time namespaces")
	}
	out := &specs.Linux{
		CgroupsPath: path.Join(g.Cgroup, id), // the host's path names the host's cgroup
		Personality: in.Personality,
	}
	var err error
	if out.Namespaces, err = g.namespaces(in); err != nil {
		return nil, err
	}
	if OwnNamespace(out, specs.UserNamespace) {
		out.UIDMappings, out.GIDMappings = in.UIDMappings, in.GIDMappings
	}
	if out.Sysctl, err = containerSysctls(in.Sysctl, out); err != nil {
		return nil, err
	}
	if out.Resources, err = g.Resources(in.Resources); err != nil {
		return nil, err
	}
	if out.Devices, err = g.devices(in.Devices); err != nil {
		return nil, err
	}
	out.Resources.Devices = DeviceRules(out.Devices)
	if in.Seccomp != nil {
		if in.Seccomp.ListenerPath != "" || in.Seccomp.ListenerMetadata != "" {
			return nil, refused("linux.seccomp.listenerPath: a seccomp agent of the host cannot be reached")
		}
		out.Seccomp = in.Seccomp
	}
	if out.MaskedPaths, err = cleanPaths("maskedPaths", in.MaskedPaths); err != nil {
		return nil, err
	}
	if out.ReadonlyPaths, err = cleanPaths("readonlyPaths", in.ReadonlyPaths); err != nil {
		return nil, err
	}
	switch in.RootfsPropagation {
	case "", "private", "rprivate", "slave", "rslave", "shared", "rshared", "unbindable", "runbindable":
		out.RootfsPropagation = in.RootfsPropagation
	default:
		return nil, refused("linux.rootfsPropagation %q is not known", in.RootfsPropagation)
	}
	return out, nil
}

// namespaces translates the host's list. A path only says "share the pod's": it is never opened.
func (g *Guest) namespaces(in *specs.Linux) ([]specs.LinuxNamespace, error) {
	asked := map[specs.LinuxNamespaceType]specs.LinuxNamespace{}
	for _, n := range in.Namespaces {
		if _, ok := asked[n.Type]; ok {
			return nil, refused("namespace %q is named twice", n.Type)
		}
		asked[n.Type] = n
	}
	out := []specs.LinuxNamespace{{Type: specs.MountNamespace}, {Type: specs.CgroupNamespace}}
	for t, n := range asked {
		switch t {
		case specs.NetworkNamespace, specs.MountNamespace, specs.CgroupNamespace,
			specs.IPCNamespace, specs.UTSNamespace, specs.PIDNamespace:
		case specs.UserNamespace:
			// A path means the pod's user namespace. Each container gets one of its own with the same mapping instead,
			// which looks the same from the inside.
			if len(in.UIDMappings) == 0 || len(in.GIDMappings) == 0 {
				return nil, refused("a user namespace needs uidMappings and gidMappings")
			}
			out = append(out, specs.LinuxNamespace{Type: t})
		case specs.TimeNamespace:
			return nil, refused("time namespaces are not supported")
		default:
			return nil, refused("namespace %q is not known", n.Type)
		}
	}
	// Network is left out: every container is in the guest's own network namespace, which is the pod's.
	for _, shared := range []struct {
		t    specs.LinuxNamespaceType
		path string
	}{{specs.IPCNamespace, g.IPC}, {specs.UTSNamespace, g.UTS}, {specs.PIDNamespace, g.PID}} {
		n, ok := asked[shared.t]
		if ok && n.Path == "" {
			out = append(out, specs.LinuxNamespace{Type: shared.t})
			continue
		}
		// Missing means "the host's" in a runtime spec, which is the guest here. Its processes are the agent, and no container sees
		// it: the widest is the pod's.
		if !ok && shared.t != specs.PIDNamespace {
			continue
		}
		if shared.path == "" {
			return nil, fmt.Errorf("the container asks for the pod's %s namespace, and the pod has none: %w",
				shared.t, errdefs.ErrFailedPrecondition)
		}
		out = append(out, specs.LinuxNamespace{Type: shared.t, Path: shared.path})
	}
	return out, nil
}

// containerSysctls lets through what acts on a namespace of the container's own. Everything else is the pod's
// (ConfigureSandbox) or the guest's.
func containerSysctls(in map[string]string, l *specs.Linux) (map[string]string, error) {
	out := make(map[string]string, len(in))
	for key, value := range in {
		switch wire.ScopeOfSysctl(key) {
		case wire.SysctlIPC:
			if !OwnNamespace(l, specs.IPCNamespace) {
				return nil, refused("sysctl %q: the container shares the pod's ipc namespace, set it on the pod", key)
			}
		case wire.SysctlUTS:
			if !OwnNamespace(l, specs.UTSNamespace) {
				return nil, refused("sysctl %q: the container shares the pod's uts namespace, set it on the pod", key)
			}
		case wire.SysctlNetwork:
			return nil, refused("sysctl %q: the network is the pod's, set it on the pod", key)
		default:
			return nil, refused("sysctl %q is not allowed", key)
		}
		out[key] = value
	}
	return out, nil
}

func cleanPaths(field string, in []string) ([]string, error) {
	for _, p := range in {
		if !path.IsAbs(p) || strings.ContainsRune(p, 0) {
			return nil, refused("linux.%s: %q is not an absolute path", field, p)
		}
	}
	return in, nil
}

// refused returns the error for a specification that asks for something that the guest does not do.
func refused(format string, args ...any) error {
	return fmt.Errorf("%s: %w", fmt.Sprintf(format, args...), errdefs.ErrInvalidArgument)
}
