// SPDX-License-Identifier: Apache-2.0

package pods

import (
	"context"
	"fmt"
	"maps"
	"strconv"

	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/cloister-project/cloister/agent-protocol/wire"
	"github.com/cloister-project/cloister/configs"
	"github.com/cloister-project/cloister/shim/criv1"
	vc "github.com/cloister-project/cloister/virtcontainers"
)

// Annotations that containerd's CRI plugin writes into specifications (containerd/internal/cri/annotations).
const (
	AnnotationContainerType   = "io.kubernetes.cri.container-type"
	AnnotationSandboxID       = "io.kubernetes.cri.sandbox-id"
	annotationSandboxCPUQuota = "io.kubernetes.cri.sandbox-cpu-quota"
	annotationSandboxCPUPer   = "io.kubernetes.cri.sandbox-cpu-period"
	annotationSandboxCPUShare = "io.kubernetes.cri.sandbox-cpu-shares"
	annotationSandboxMemory   = "io.kubernetes.cri.sandbox-memory"

	ContainerTypeSandbox   = "sandbox"
	ContainerTypeContainer = "container"
)

// Request is what is common to all ways of asking for a pod.
type Request struct {
	ID, Namespace, Bundle string
	// Rootfs is that of a container which is alone in its pod.
	Rootfs []*types.Mount
	// Options are the runtime's; nil for the node's defaults.
	Options *anypb.Any
	OnOOM   func(containerID string)
}

// Options returns the runtime options of a pod that a task makes: the task's, or those that its shim was started with if there
// are none, or runc's.
func Options(ctx context.Context, task *anypb.Any, started func() (*anypb.Any, error)) (*anypb.Any, error) {
	ignored, runc, err := configs.RuncOptions(task)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	if len(ignored) > 0 {
		log.G(ctx).WithField("options", ignored).Warn("options of runc have no effect in a VM")
	}
	if task.GetTypeUrl() != "" && !runc {
		return task, nil
	}
	return started()
}

// loadConfig returns the node's configuration with the pod's annotations applied.
func loadConfig(ctx context.Context, options *anypb.Any, annotations map[string]string) (*configs.Config, error) {
	c, err := configs.FromOptions(options)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	if ignored := c.IgnoredAnnotations(annotations); len(ignored) > 0 {
		log.G(ctx).WithField("annotations", ignored).Warn("annotations of the pod have no effect: annotations.allowed does not list them")
	}
	if c, err = c.ApplyAnnotations(annotations); err != nil {
		return nil, fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	if log.GetLevel() < log.DebugLevel {
		// One shim is one pod's. Where containerd asks for debugging, it gets it whatever the node says.
		if err := log.SetLevel(c.Log.Level); err != nil {
			return nil, err
		}
	}
	return c, nil
}

func (r Request) base(config *configs.Config, annotations map[string]string) vc.PodConfig {
	return vc.PodConfig{
		ID: r.ID, Namespace: r.Namespace, Bundle: r.Bundle, Config: config, Annotations: annotations, OnOOM: r.OnOOM,
	}
}

// FromCRI makes a pod's configuration out of CreateSandbox's.
func FromCRI(ctx context.Context, r Request, c *criv1.PodSandboxConfig, netnsPath string, annotations map[string]string) (vc.PodConfig,
	error) {
	merged := make(map[string]string, len(annotations)+len(c.GetAnnotations()))
	for _, m := range []map[string]string{annotations, c.GetAnnotations()} {
		for k, v := range m {
			merged[k] = v
		}
	}
	config, err := loadConfig(ctx, r.Options, merged)
	if err != nil {
		return vc.PodConfig{}, err
	}
	namespaces := c.GetLinux().GetSecurityContext().GetNamespaceOptions()
	if err := checkUsers(namespaces.GetUsernsOptions()); err != nil {
		return vc.PodConfig{}, err
	}
	p := r.base(config, merged)
	p.Hostname = c.GetHostname()
	p.DNS = vc.DNS{
		Servers: c.GetDnsConfig().GetServers(), Searches: c.GetDnsConfig().GetSearches(), Options: c.GetDnsConfig().GetOptions(),
	}
	p.OwnFiles = true
	p.Sysctls = withDefaultSysctls(c.GetLinux().GetSysctls())
	p.HostPID = namespaces.GetPid() == criv1.NamespaceMode_NODE
	p.HostIPC = namespaces.GetIpc() == criv1.NamespaceMode_NODE
	p.Resources = Resources(c.GetLinux().GetResources())
	p.CgroupParent = c.GetLinux().GetCgroupParent()
	switch {
	case namespaces.GetNetwork() == criv1.NamespaceMode_NODE:
		p.Network = vc.NetworkHost
	case netnsPath == "":
		p.Network = vc.NetworkNew
	default:
		p.Network, p.NetNSPath = vc.NetworkPath, netnsPath
	}
	return p, nil
}

// checkUsers looks at the user namespace of a pod. Its containers bring their maps with them; what containerd would refuse of theirs,
// and what no snapshot can be made for, is told before the VM is made.
func checkUsers(u *criv1.UserNamespace) error {
	fault := ""
	switch mode := u.GetMode(); {
	case u == nil, mode == criv1.NamespaceMode_NODE && len(u.GetUids())+len(u.GetGids()) == 0:
	case mode == criv1.NamespaceMode_NODE:
		fault = "the host's users are asked for (NODE), and a map as well"
	case mode != criv1.NamespaceMode_POD:
		fault = fmt.Sprintf("the mode is %s, and only POD and NODE are possible", mode)
	case len(u.GetUids()) != 1 || len(u.GetGids()) != 1:
		fault = fmt.Sprintf("there are %d ranges of users and %d of groups, and each has to be one", len(u.GetUids()), len(u.GetGids()))
	case u.GetUids()[0].GetContainerId() != 0 || u.GetGids()[0].GetContainerId() != 0:
		fault = "the container's root (0) is not mapped"
	case u.GetUids()[0].GetLength() == 0 || u.GetGids()[0].GetLength() == 0:
		fault = "a range is empty"
	}
	if fault == "" {
		return nil
	}
	return fmt.Errorf("user namespace of the pod (hostUsers: false): %s: %w", fault, errdefs.ErrInvalidArgument)
}

// defaultSysctls are what containerd's CRI plugin gives pods of runc by itself (enable_unprivileged_ports, enable_unprivileged_icmp,
// both true by default), and leaves to the shim in pods that a shim makes.
var defaultSysctls = map[string]string{
	"net.ipv4.ip_unprivileged_port_start": "0",
	"net.ipv4.ping_group_range":           "0 2147483647",
}

// withDefaultSysctls adds what a pod does not set itself.
func withDefaultSysctls(asked map[string]string) map[string]string {
	all := maps.Clone(defaultSysctls)
	maps.Copy(all, asked)
	return all
}

// FromSpec makes a pod's configuration out of the specification of the pause container or of a container that is alone
// in its pod.
func FromSpec(ctx context.Context, r Request, mode Mode, spec *specs.Spec) (vc.PodConfig, error) {
	config, err := loadConfig(ctx, r.Options, spec.Annotations)
	if err != nil {
		return vc.PodConfig{}, err
	}
	p := r.base(config, spec.Annotations)
	p.Hostname = spec.Hostname
	// What it has no namespace for, a specification wants of the host. Of a lone container it is the guest's that is meant, but for the
	// network: who leaves that out (ctr run --net-host, nerdctl run --net host) would find nothing in a guest's.
	p.Network, p.HostPID, p.HostIPC = vc.NetworkHost, mode == ModePause, mode == ModePause
	if l := spec.Linux; l != nil {
		p.Sysctls = l.Sysctl
		if mode == ModeSingle {
			// The rest is set in the container's own namespaces.
			p.Sysctls = maps.Clone(l.Sysctl)
			maps.DeleteFunc(p.Sysctls, func(key, _ string) bool { return wire.ScopeOfSysctl(key) != wire.SysctlNetwork })
		}
		p.CgroupsPath = l.CgroupsPath
		p.Resources = l.Resources
		for _, ns := range l.Namespaces {
			switch ns.Type {
			case specs.PIDNamespace:
				p.HostPID = false
			case specs.IPCNamespace:
				p.HostIPC = false
			case specs.NetworkNamespace:
				p.Network, p.NetNSPath = vc.NetworkNew, ns.Path
				if ns.Path != "" {
					p.Network = vc.NetworkPath
				}
			}
		}
	}
	if mode == ModePause {
		if p.Resources, err = annotatedResources(spec.Annotations); err != nil {
			return vc.PodConfig{}, err
		}
	} else {
		p.Hooks, p.Only, p.OnlyRootfs = spec.Hooks, spec, append([]*types.Mount{}, r.Rootfs...)
	}
	return p, nil
}

// annotatedResources are the pod's limits as CRI writes them beside the pause container's own; nil if it wrote none.
func annotatedResources(annotations map[string]string) (*specs.LinuxResources, error) {
	c := &criv1.LinuxContainerResources{}
	for key, to := range map[string]*int64{
		annotationSandboxCPUQuota: &c.CpuQuota, annotationSandboxCPUPer: &c.CpuPeriod,
		annotationSandboxCPUShare: &c.CpuShares, annotationSandboxMemory: &c.MemoryLimitInBytes,
	} {
		s, ok := annotations[key]
		if !ok {
			continue
		}
		n, err := strconv.ParseInt(s, 10, 64)
		if err != nil {
			return nil, fmt.Errorf("annotation %s: %q is not a whole number: %w", key, s, errdefs.ErrInvalidArgument)
		}
		*to = n
	}
	return Resources(c), nil
}

// Resources turns CRI's limits into OCI's; nil if there is no limit. Zero means that a limit is not set.
func Resources(c *criv1.LinuxContainerResources) *specs.LinuxResources {
	r := &specs.LinuxResources{}
	some := false
	set := func(dst **int64, v int64) {
		if v != 0 {
			*dst, some = &v, true
		}
	}
	var cpu specs.LinuxCPU
	var memory specs.LinuxMemory
	set(&cpu.Quota, c.GetCpuQuota())
	set(&memory.Limit, c.GetMemoryLimitInBytes())
	set(&memory.Swap, c.GetMemorySwapLimitInBytes())
	for _, u := range []struct {
		dst **uint64
		v   int64
	}{{&cpu.Period, c.GetCpuPeriod()}, {&cpu.Shares, c.GetCpuShares()}} {
		if u.v > 0 {
			v := uint64(u.v)
			*u.dst, some = &v, true
		}
	}
	cpu.Cpus, cpu.Mems = c.GetCpusetCpus(), c.GetCpusetMems()
	some = some || cpu.Cpus != "" || cpu.Mems != ""
	for _, h := range c.GetHugepageLimits() {
		r.HugepageLimits = append(r.HugepageLimits, specs.LinuxHugepageLimit{Pagesize: h.GetPageSize(), Limit: h.GetLimit()})
		some = true
	}
	if len(c.GetUnified()) > 0 {
		r.Unified, some = c.GetUnified(), true
	}
	if !some {
		return nil
	}
	r.CPU, r.Memory = &cpu, &memory
	return r
}
