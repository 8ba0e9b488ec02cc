// SPDX-License-Identifier: Apache-2.0

package dryrun

import (
	"cmp"
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/cloister-project/cloister/configs"
	"github.com/cloister-project/cloister/tee"
	vc "github.com/cloister-project/cloister/virtcontainers"
	"github.com/cloister-project/cloister/virtcontainers/dryrun/manifest"
	"github.com/cloister-project/cloister/virtcontainers/vmplan"
	"github.com/cloister-project/cloister/virtcontainers/volumes"
)

const (
	// PodID stands for the one that containerd makes.
	PodID = "plan"
	// podNamespace is containerd's for Kubernetes.
	podNamespace = "k8s.io"
	// kubeletPod is where the kubelet would have the pod's volumes.
	kubeletPod = "/var/lib/kubelet/pods/00000000-0000-0000-0000-000000000000"
)

// freeLimits cost the VM nothing.
var freeLimits = []string{manifest.LimitCPU, manifest.LimitMemory, "ephemeral-storage", "pods"}

// PlatformOf returns the platform that a pod's class names, where nobody names one (given). The notes say what a person
// may wonder about.
func PlatformOf(given string, p *manifest.Pod) (name string, notes []string) {
	const class = "cloister"
	asked := p.Spec.RuntimeClassName
	switch rest, ours := strings.CutPrefix(asked, class+"-"); {
	case asked == "" || asked == class:
		return given, nil
	case ours && slices.Contains(tee.Names(), tee.Name(rest)):
		if given != "" && given != rest {
			return given, []string{fmt.Sprintf("runtimeClassName is %s and the plan is for platform %s", asked, given)}
		}
		return rest, nil
	default:
		return given, []string{fmt.Sprintf("runtimeClassName %s names no platform: whether it is one of Cloister's, "+
			"containerd's configuration says", asked)}
	}
}

// podConfig is what the shim would be asked for, as far as a manifest tells. The configuration comes with the pod's
// annotations applied.
func podConfig(cfg *configs.Config, p *manifest.Pod) vc.PodConfig {
	c := vc.PodConfig{
		ID: PodID, Namespace: podNamespace, Config: cfg, Hostname: p.Metadata.Name, OwnFiles: true, Network: vc.NetworkNew,
		HostPID: p.Spec.HostPID, HostIPC: p.Spec.HostIPC, Resources: p.Spec.Limits(), Annotations: p.Metadata.Annotations,
	}
	if p.Spec.HostNetwork {
		c.Network = vc.NetworkHost
	}
	// All mounts of all containers in one specification: what is refused of them is the launch's to say.
	c.Only = &specs.Spec{Process: &specs.Process{Cwd: "/"}}
	seen := map[string]bool{}
	for _, m := range mountsOf(p.Spec) {
		if !m.known {
			continue
		}
		if key := fmt.Sprintf("%q %q %q", m.spec.Source, m.spec.Destination, m.spec.Options); !seen[key] {
			seen[key] = true
			c.Only.Mounts = append(c.Only.Mounts, m.spec)
		}
	}
	return c
}

// mount is a volume in a container.
type mount struct {
	container string
	of        manifest.VolumeMount
	// spec is what containerd would be given; known: the pod has the volume.
	spec  specs.Mount
	known bool
}

// mountsOf are all mounts of all containers, in order.
func mountsOf(s manifest.Spec) (all []mount) {
	byName := make(map[string]manifest.Volume, len(s.Volumes))
	for _, v := range slices.Backward(s.Volumes) {
		byName[v.Name()] = v // the first of a name counts
	}
	for _, c := range s.All() {
		for _, m := range c.VolumeMounts {
			one := mount{container: c.Name, of: m}
			var v manifest.Volume
			if v, one.known = byName[m.Name]; one.known {
				one.spec = specMount(v, m)
			}
			all = append(all, one)
		}
	}
	return all
}

// specMount is a container's mount as containerd would be given it.
func specMount(v manifest.Volume, m manifest.VolumeMount) specs.Mount {
	source := v.Field("path")
	if kind := v.Kind(); kind != "hostPath" {
		source = volumes.Path{Pod: kubeletPod, Plugin: volumes.Plugin(kind), Volume: m.Name}.Dir()
	}
	options := []string{"rbind", "rprivate"}
	switch m.MountPropagation {
	case "Bidirectional":
		options[1] = "rshared"
	case "HostToContainer":
		options[1] = "rslave"
	}
	return specs.Mount{
		Source: filepath.Join(source, cmp.Or(m.SubPath, m.SubPathExpr)), Destination: m.MountPath, Type: "bind", Options: options,
	}
}

// Volume says what becomes of a volume.
type Volume struct {
	Name    string  `json:"name"`
	Kind    string  `json:"kind"`
	Becomes Outcome `json:"becomes"`
	Detail  string  `json:"detail"`
}

// volumesOf says what becomes of each volume. One that several containers mount is refused if one of them is refused it.
func volumesOf(cfg *configs.Config, s manifest.Spec) []Volume {
	sharing, mounted := vmplan.SharingOf(cfg), make(map[string][]specs.Mount)
	for _, m := range mountsOf(s) {
		if m.known {
			mounted[m.of.Name] = append(mounted[m.of.Name], m.spec)
		}
	}
	plans := []Volume{}
	for _, v := range s.Volumes {
		p := Volume{Name: v.Name(), Kind: v.Kind(), Becomes: Unused, Detail: "no container mounts it"}
		for i, m := range mounted[v.Name()] {
			becomes, detail := outcomeOf(m, sharing)
			if i == 0 || becomes == Refused {
				p.Becomes, p.Detail = becomes, shorten(detail)
			}
			if becomes == Refused {
				break
			}
		}
		plans = append(plans, p)
	}
	return plans
}

// shorten leaves out the pod's directory, which is made up.
func shorten(text string) string { return strings.ReplaceAll(text, kubeletPod, "…") }

// refusals are what a manifest asks for and containerd or the kubelet would hand over as devices, and what names no
// volume.
func refusals(s manifest.Spec) []string {
	var all []string
	for _, c := range s.All() {
		for name := range c.Resources.Limits {
			if !slices.Contains(freeLimits, name) {
				all = append(all, fmt.Sprintf("container %s: limit %s: a VM has none of the host's devices and huge pages; remove it, or run this pod "+
					"with another runtime", c.Name, name))
			}
		}
		for _, d := range c.VolumeDevices {
			all = append(all, fmt.Sprintf("container %s: volume %s as the device %s: a VM has none of the host's devices; mount a file system",
				c.Name, d.Name, d.DevicePath))
		}
	}
	for _, m := range mountsOf(s) {
		if !m.known {
			all = append(all, fmt.Sprintf("container %s: mount at %s names the volume %q, which the pod does not have",
				m.container, m.of.MountPath, m.of.Name))
		}
	}
	slices.Sort(all)
	return all
}
