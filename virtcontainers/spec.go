// SPDX-License-Identifier: Apache-2.0

package virtcontainers

import (
	"encoding/json"
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/cloister-project/cloister/agent-protocol/wire"
)

// containerPlan is a container's OCI specification after the host's allow-list.
type containerPlan struct {
	// spec in JSON, as the agent gets it.
	spec []byte
	// mounts in order, still with the host's paths.
	mounts []specs.Mount
}

// RefusedError lists everything in a container's specification that cannot be had in a VM. It is an
// errdefs.ErrInvalidArgument.
type RefusedError struct {
	Reasons []string
}

// Error names all reasons.
func (e *RefusedError) Error() string {
	return "this asks for what a VM cannot give:\n  - " + strings.Join(e.Reasons, "\n  - ")
}

// Unwrap gives the error's kind.
func (e *RefusedError) Unwrap() error { return errdefs.ErrInvalidArgument }

// guestDevices are the device nodes that a container may ask for: the standard set, which the guest makes itself.
// Devices of the host mean nothing in a VM.
var guestDevices = []string{
	"/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/tty", "/dev/console", "/dev/ptmx", "/dev/fuse",
}

// planContainer splits a specification into what the guest gets and what the host does about it. What is left out here
// is either meaningless in a VM or made anew there; what cannot be honoured is refused, all of it in one RefusedError.
// The agent of a confidential VM has rules of its own; here its mounts are refused with what can be done about them.
// apart tells why the VM shares no files with the host, if so (launch.apart).
func planContainer(spec *specs.Spec, pod PodConfig, apart string) (*containerPlan, error) {
	if spec == nil || spec.Process == nil {
		return nil, fmt.Errorf("the OCI specification has no process: %w", errdefs.ErrInvalidArgument)
	}
	var refused []string
	out := &specs.Spec{
		Version:  spec.Version,
		Process:  guestProcess(spec.Process),
		Hostname: spec.Hostname,
		Root:     &specs.Root{Path: "rootfs"},
		Linux:    &specs.Linux{},
	}
	if spec.Root != nil {
		out.Root.Readonly = spec.Root.Readonly
	}
	if l := spec.Linux; l != nil {
		out.Linux = &specs.Linux{
			UIDMappings:       l.UIDMappings,
			GIDMappings:       l.GIDMappings,
			Sysctl:            l.Sysctl,
			Resources:         guestResources(l.Resources),
			Seccomp:           l.Seccomp,
			RootfsPropagation: l.RootfsPropagation,
			MaskedPaths:       l.MaskedPaths,
			ReadonlyPaths:     l.ReadonlyPaths,
		}
		for _, ns := range l.Namespaces {
			if ns.Type == specs.NetworkNamespace {
				continue // the guest's own is the pod's
			}
			if ns.Path != "" {
				// A path on the host; for the guest only the fact that there is one counts.
				ns.Path = "pod"
			}
			out.Linux.Namespaces = append(out.Linux.Namespaces, ns)
		}
		var devices []string
		for _, d := range l.Devices {
			if slices.Contains(guestDevices, filepath.Clean(d.Path)) {
				if d.Path == "/dev/fuse" {
					out.Linux.Devices = append(out.Linux.Devices, d)
				}
				continue
			}
			devices = append(devices, d.Path)
		}
		if len(devices) > 0 {
			refused = append(refused, fmt.Sprintf("host devices %s: a VM has none of the host's devices; remove them, "+
				"or for privileged pods set privileged_without_host_devices = true for this runtime in containerd's configuration",
				abbreviate(devices, 8)))
		}
	}
	plan := &containerPlan{}
	for _, m := range spec.Mounts {
		if reason := checkMount(m); reason != "" {
			refused = append(refused, fmt.Sprintf("mount of %s (type %q) at %s: %s", m.Source, m.Type, m.Destination, reason))
			continue
		}
		if apart != "" && isLive(m) {
			if reason := refuseLive(m, apart); reason != "" {
				refused = append(refused, reason)
				continue
			}
		}
		plan.mounts = append(plan.mounts, m)
	}
	if len(spec.Mounts) > wire.MaxMounts {
		refused = append(refused, fmt.Sprintf("%d mounts; the limit is %d", len(spec.Mounts), wire.MaxMounts))
	}
	if len(refused) > 0 {
		return nil, &RefusedError{Reasons: refused}
	}
	if pod.OwnFiles {
		plan.mounts = addPodFiles(plan.mounts, spec)
	}
	b, err := json.Marshal(out)
	if err != nil {
		return nil, err
	}
	if len(b) > wire.MaxSpec {
		return nil, fmt.Errorf("the OCI specification has %d bytes, the limit is %d (is the environment very large?): %w",
			len(b), wire.MaxSpec, errdefs.ErrInvalidArgument)
	}
	plan.spec = b
	return plan, nil
}

// addPodFiles adds the pod's files that a container does not bring mounts of its own for, and makes the private /dev/shm
// that every specification begins with the pod's, if the container shares the pod's ipc namespace.
func addPodFiles(mounts []specs.Mount, spec *specs.Spec) []specs.Mount {
	mounts = slices.Clone(mounts)
	sharedIPC := spec.Linux != nil && slices.ContainsFunc(spec.Linux.Namespaces, func(ns specs.LinuxNamespace) bool {
		return ns.Type == specs.IPCNamespace && ns.Path != ""
	})
	taken := map[string]bool{}
	for i, m := range mounts {
		destination := filepath.Clean(m.Destination)
		taken[destination] = true
		if destination == podShm && m.Type == "tmpfs" && m.Source == "shm" && sharedIPC {
			mounts[i] = specs.Mount{Destination: podShm, Type: "bind", Options: []string{"rbind", "nosuid", "noexec", "nodev", "rw"}}
		}
	}
	options := []string{"rbind", "rprivate", "rw"}
	if spec.Root != nil && spec.Root.Readonly {
		options[2] = "ro"
	}
	for _, destination := range podFiles {
		if !taken[destination] {
			mounts = append(mounts, specs.Mount{Destination: destination, Type: "bind", Options: options})
		}
	}
	return mounts
}

func abbreviate(list []string, most int) string {
	if len(list) <= most {
		return strings.Join(list, ", ")
	}
	return fmt.Sprintf("%s and %d more", strings.Join(list[:most], ", "), len(list)-most)
}

// guestProcess leaves out what belongs to the host's own security modules and scheduler.
func guestProcess(p *specs.Process) *specs.Process {
	if p == nil {
		return nil
	}
	return &specs.Process{
		Terminal:        p.Terminal,
		ConsoleSize:     p.ConsoleSize,
		User:            p.User,
		Args:            p.Args,
		Env:             p.Env,
		Cwd:             p.Cwd,
		Capabilities:    p.Capabilities,
		Rlimits:         p.Rlimits,
		NoNewPrivileges: p.NoNewPrivileges,
		OOMScoreAdj:     p.OOMScoreAdj,
	}
}

// guestResources leaves out what names devices, cards or NUMA nodes of the host.
func guestResources(r *specs.LinuxResources) *specs.LinuxResources {
	if r == nil {
		return nil
	}
	out := &specs.LinuxResources{Pids: r.Pids, Unified: r.Unified, Devices: r.Devices}
	if r.Memory != nil {
		m := *r.Memory
		out.Memory = &m
	}
	if r.CPU != nil {
		c := *r.CPU
		// CPU numbers are the host's.
		c.Cpus, c.Mems = "", ""
		out.CPU = &c
	}
	return out
}

// Mount types that the guest's kernel provides without anything from the host.
var guestFilesystems = []string{"proc", "sysfs", "tmpfs", "devpts", "mqueue", "cgroup", "cgroup2", "ramfs"}

// isBind reports whether a mount brings a file or folder of the host.
func isBind(m specs.Mount) bool {
	return m.Type == "bind" || slices.Contains(m.Options, "bind") || slices.Contains(m.Options, "rbind")
}

func checkMount(m specs.Mount) string {
	switch {
	case !filepath.IsAbs(m.Destination):
		return "the destination is not an absolute path"
	case isBind(m):
		if !filepath.IsAbs(m.Source) {
			return "the source is not an absolute path"
		}
		if slices.Contains(m.Options, "rshared") || slices.Contains(m.Options, "shared") {
			return "mounts made in a VM cannot propagate to the host (Bidirectional propagation); use HostToContainer or None"
		}
		return ""
	case slices.Contains(guestFilesystems, m.Type):
		return ""
	default:
		return "this type of mount is not known; known are bind and " + strings.Join(guestFilesystems, ", ")
	}
}
