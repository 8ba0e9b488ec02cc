// SPDX-License-Identifier: Apache-2.0

package ocispec

import (
	"encoding/json"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/cloister-project/cloister/agent-protocol/wire"
	"github.com/cloister-project/cloister/internal/idmap"
	"github.com/cloister-project/cloister/virtcontainers/refusal"
)

// podNamespace stands for the path of a namespace on the host; for the guest only the fact that there is one counts.
const podNamespace = "pod"

// standardDevices are the device nodes that the guest makes for every container. Devices of the host mean nothing in a VM.
var standardDevices = []string{
	"/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/tty", "/dev/console", "/dev/ptmx",
}

// Container returns a container's specification for the guest, in JSON and without mounts. What it asks for and cannot
// have is a *refusal.Error that lists all of it. The sysctls of the network of a container that is alone in its pod are the
// pod's, and left out.
func Container(spec *specs.Spec, alone bool) ([]byte, error) {
	if spec == nil || spec.Process == nil {
		return nil, fmt.Errorf("the OCI specification has no process: %w", errdefs.ErrInvalidArgument)
	}
	out := &specs.Spec{
		Version:  spec.Version,
		Process:  process(spec.Process),
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
			Sysctl:            maps.Clone(l.Sysctl),
			Resources:         resources(l.Resources),
			Namespaces:        namespaces(l.Namespaces),
			Seccomp:           l.Seccomp,
			RootfsPropagation: l.RootfsPropagation,
			MaskedPaths:       l.MaskedPaths,
			ReadonlyPaths:     l.ReadonlyPaths,
		}
		if alone {
			maps.DeleteFunc(out.Linux.Sysctl, func(key, _ string) bool { return wire.ScopeOfSysctl(key) == wire.SysctlNetwork })
		}
		var reasons []string
		for _, key := range slices.Sorted(maps.Keys(out.Linux.Sysctl)) {
			if wire.ScopeOfSysctl(key) == wire.SysctlRefused {
				reasons = append(reasons, fmt.Sprintf("sysctl %s: leave it out: it is the guest's kernel's as a whole", key))
			}
		}
		var refused []specs.LinuxDevice
		out.Linux.Devices, refused = devices(l.Devices)
		if err := refusal.Of(append(reasons, deviceReasons(refused)...)); err != nil {
			return nil, err
		}
	}
	b, err := json.Marshal(out)
	if err != nil {
		return nil, err
	}
	if len(b) > wire.MaxSpec {
		return nil, fmt.Errorf("the OCI specification has %d bytes, the limit is %d (is the environment very large?): %w",
			len(b), wire.MaxSpec, errdefs.ErrInvalidArgument)
	}
	return b, nil
}

// IDs returns the map of a container's user namespace; none if it has none.
func IDs(spec *specs.Spec) idmap.Map {
	if spec.Linux == nil || !slices.ContainsFunc(spec.Linux.Namespaces, func(ns specs.LinuxNamespace) bool {
		return ns.Type == specs.UserNamespace
	}) {
		return idmap.Map{}
	}
	return idmap.Of(spec.Linux.UIDMappings, spec.Linux.GIDMappings)
}

// Process returns a process's specification for the guest, in JSON.
func Process(p *specs.Process) ([]byte, error) { return json.Marshal(process(p)) }

// Resources returns limits for the guest, in JSON.
func Resources(r *specs.LinuxResources) ([]byte, error) { return json.Marshal(resources(r)) }

// namespaces leaves out the network's, since the guest's own is the pod's, and the host's paths.
func namespaces(list []specs.LinuxNamespace) []specs.LinuxNamespace {
	var out []specs.LinuxNamespace
	for _, ns := range list {
		if ns.Type == specs.NetworkNamespace {
			continue
		}
		if ns.Path != "" {
			ns.Path = podNamespace
		}
		out = append(out, ns)
	}
	return out
}

// deviceReasons are why devices of the host are refused; none if there are none.
func deviceReasons(refused []specs.LinuxDevice) []string {
	if len(refused) == 0 {
		return nil
	}
	var paths []string
	block := true
	for _, d := range refused {
		paths = append(paths, d.Path)
		block = block && d.Type == "b"
	}
	if block {
		return []string{fmt.Sprintf("volumeDevices %s: use volumeMode: Filesystem: block devices of the host are not passed on to a VM",
			abbreviate(paths, 8))}
	}
	return []string{fmt.Sprintf("host devices %s: leave them out, or for privileged pods set privileged_without_host_devices = true for "+
		"this runtime in containerd's configuration (ctr, nerdctl: --cap-add in place of --privileged): a VM has none of the host's devices",
		abbreviate(paths, 8))}
}

// devices returns those that the guest is asked for, and those that are refused. The standard ones it makes unasked.
func devices(list []specs.LinuxDevice) (asked, refused []specs.LinuxDevice) {
	for _, d := range list {
		switch path := filepath.Clean(d.Path); {
		case slices.Contains(wire.ContainerDevices, path):
			asked = append(asked, d)
		case !slices.Contains(standardDevices, path):
			refused = append(refused, d)
		}
	}
	return asked, refused
}

func abbreviate(list []string, most int) string {
	if len(list) <= most {
		return strings.Join(list, ", ")
	}
	return fmt.Sprintf("%s and %d more", strings.Join(list[:most], ", "), len(list)-most)
}

// process leaves out what belongs to the host's own security modules and scheduler.
func process(p *specs.Process) *specs.Process {
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

// resources leaves out what names devices, cards or NUMA nodes of the host.
func resources(r *specs.LinuxResources) *specs.LinuxResources {
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
