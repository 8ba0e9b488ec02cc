// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"fmt"
	"math/big"
	"path/filepath"
	"slices"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/cloister-project/cloister/configs"
	"github.com/cloister-project/cloister/tee"
	vc "github.com/cloister-project/cloister/virtcontainers"
)

// cpuPeriod is the kubelet's, microseconds.
const cpuPeriod = 100000

// Limits that a VM is sized by; everything else that containers can ask for in limits is a device of the host.
const (
	limitCPU    = "cpu"
	limitMemory = "memory"
)

// freeLimits cost the VM nothing.
var freeLimits = []string{limitCPU, limitMemory, "ephemeral-storage", "pods"}

// limits sums up a pod's limits as the kubelet does for its sandbox: containers and sidecars run together, each other init
// container before them, and limits of the pod as a whole count first.
func (s podSpec) limits() *specs.LinuxResources {
	of := func(name string) quantity {
		if q, ok := s.Resources.Limits[name]; ok {
			return q
		}
		sum, before, most := new(big.Rat), new(big.Rat), new(big.Rat)
		for _, c := range s.InitContainers {
			q := c.Resources.Limits[name].value
			if q == nil {
				continue
			}
			if c.RestartPolicy == "Always" {
				sum.Add(sum, q)
				before.Add(before, q)
				q = new(big.Rat)
			}
			if one := new(big.Rat).Add(before, q); one.Cmp(most) > 0 {
				most = one
			}
		}
		for _, c := range s.Containers {
			if q := c.Resources.Limits[name].value; q != nil {
				sum.Add(sum, q)
			}
		}
		if most.Cmp(sum) > 0 {
			sum = most
		}
		return quantity{sum}
	}
	r := &specs.LinuxResources{}
	if memory := of(limitMemory).times(1); memory > 0 {
		r.Memory = &specs.LinuxMemory{Limit: &memory}
	}
	if milli := of(limitCPU).times(1000); milli > 0 {
		quota, period := min(milli, 1<<40)*(cpuPeriod/1000), uint64(cpuPeriod)
		r.CPU = &specs.LinuxCPU{Quota: &quota, Period: &period}
	}
	return r
}

// podID stands for the one that containerd makes.
const podID = "plan"

// podConfig is what the shim would be asked for, as far as a manifest tells. The configuration comes with the pod's
// annotations applied.
func podConfig(cfg *configs.Config, p *pod) vc.PodConfig {
	c := vc.PodConfig{
		ID: podID, Namespace: "k8s.io", Config: cfg, Hostname: p.Metadata.Name, OwnFiles: true, Network: vc.NetworkNew,
		HostPID: p.Spec.HostPID, HostIPC: p.Spec.HostIPC, Resources: p.Spec.limits(), Annotations: p.Metadata.Annotations,
	}
	if p.Spec.HostNetwork {
		c.Network = vc.NetworkHost
	}
	// All mounts of all containers in one specification: what is refused of them is the launch's to say.
	only := &specs.Spec{Process: &specs.Process{Cwd: "/"}}
	for _, ctr := range slices.Concat(p.Spec.InitContainers, p.Spec.Containers) {
		for _, m := range ctr.VolumeMounts {
			if s, ok := p.Spec.mount(m); ok && !slices.ContainsFunc(only.Mounts, func(o specs.Mount) bool {
				return o.Source == s.Source && o.Destination == s.Destination && slices.Equal(o.Options, s.Options)
			}) {
				only.Mounts = append(only.Mounts, s)
			}
		}
	}
	c.Only = only
	return c
}

// kubeletPod is where the kubelet would have the pod's volumes.
const kubeletPod = "/var/lib/kubelet/pods/00000000-0000-0000-0000-000000000000"

// kubeletPlugins are the kubelet's names of volumes by the manifest's, as far as Cloister tells them apart.
var kubeletPlugins = map[string]string{
	"configMap": "kubernetes.io~configmap", "secret": "kubernetes.io~secret", "projected": "kubernetes.io~projected",
	"downwardAPI": "kubernetes.io~downward-api", "emptyDir": "kubernetes.io~empty-dir",
}

// mount is a container's mount as containerd would be given it.
func (s podSpec) mount(m volumeMount) (specs.Mount, bool) {
	i := slices.IndexFunc(s.Volumes, func(v volume) bool { return v.name() == m.Name })
	if i < 0 {
		return specs.Mount{}, false
	}
	v := s.Volumes[i]
	kind := v.kind()
	source := v.field("path")
	if kind != "hostPath" {
		source = filepath.Join(kubeletPod, "volumes", cmp.Or(kubeletPlugins[kind], "kubernetes.io~"+strings.ToLower(kind)), m.Name)
	}
	source = filepath.Join(source, cmp.Or(m.SubPath, m.SubPathExpr))
	options := []string{"rbind", "rprivate"}
	switch m.MountPropagation {
	case "Bidirectional":
		options[1] = "rshared"
	case "HostToContainer":
		options[1] = "rslave"
	}
	return specs.Mount{Source: source, Destination: m.MountPath, Type: "bind", Options: options}, true
}

// volumePlan says what becomes of a volume.
type volumePlan struct {
	Name string `json:"name"`
	Kind string `json:"kind"`
	// Becomes is "copied", "guest memory", "shared" or "refused".
	Becomes string `json:"becomes"`
	Detail  string `json:"detail"`
}

// volumes says what becomes of each volume that a container mounts.
func (s podSpec) volumes(name tee.Name) []volumePlan {
	plans := []volumePlan{}
	for _, v := range s.Volumes {
		used := slices.ContainsFunc(slices.Concat(s.InitContainers, s.Containers), func(c container) bool {
			return slices.ContainsFunc(c.VolumeMounts, func(m volumeMount) bool { return m.Name == v.name() })
		})
		p := volumePlan{Name: v.name(), Kind: v.kind()}
		switch {
		case !used:
			p.Becomes, p.Detail = "nothing", "no container mounts it"
		case !name.Confidential():
			p.Becomes, p.Detail = "shared", "a folder of the host, which the VM reads and writes live (virtio-fs)"
		case v.kind() == "emptyDir":
			p.Becomes, p.Detail = "guest memory", "made by the guest; the host never sees what is in it"
		case kubeletPlugins[v.kind()] != "":
			p.Becomes, p.Detail = "copied", "sent to the guest file by file, changes too; read-only"
		default:
			p.Becomes, p.Detail = "refused", "the host could read and change it"
		}
		plans = append(plans, p)
	}
	return plans
}

// refusals are what a manifest asks for and containerd or the kubelet would hand over as devices, and what names no
// volume.
func (s podSpec) refusals() []string {
	var all []string
	for _, c := range slices.Concat(s.InitContainers, s.Containers) {
		for name := range c.Resources.Limits {
			if !slices.Contains(freeLimits, name) {
				all = append(all, fmt.Sprintf("container %s: limit %s: a VM has none of the host's devices and huge pages; remove it, or run this pod with another runtime", c.Name, name))
			}
		}
		for _, d := range c.VolumeDevices {
			all = append(all, fmt.Sprintf("container %s: volume %s as the device %s: a VM has none of the host's devices; mount a file system", c.Name, d.Name, d.DevicePath))
		}
		for _, m := range c.VolumeMounts {
			if _, ok := s.mount(m); !ok {
				all = append(all, fmt.Sprintf("container %s: mount at %s names the volume %q, which the pod does not have", c.Name, m.MountPath, m.Name))
			}
		}
	}
	slices.Sort(all)
	return all
}

// wholeCPUs is a limit of so many whole CPUs.
func wholeCPUs(n int) *specs.LinuxCPU {
	quota, period := int64(n)*cpuPeriod, uint64(cpuPeriod)
	return &specs.LinuxCPU{Quota: &quota, Period: &period}
}
