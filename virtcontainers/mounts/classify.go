// SPDX-License-Identifier: Apache-2.0

package mounts

import (
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/cloister-project/cloister/agent-protocol/wire"
	"github.com/cloister-project/cloister/internal/idmap"
	"github.com/cloister-project/cloister/virtcontainers/ocispec"
	"github.com/cloister-project/cloister/virtcontainers/volumes"
)

// Kind says what becomes of a mount; see the package comment.
type Kind int

// Kinds.
const (
	Refused Kind = iota
	GuestFilesystem
	PodShm
	CgroupView
	PodFile
	Live
	Copied
	Part
	Scratch
	TerminationLog
	ImageVolume
)

// kindNames are for people.
var kindNames = [...]string{
	"refused", "guest file system", "pod's shared memory", "cgroup view", "pod file", "live", "copied", "part of a volume", "guest's own",
	"termination log", "volume of the image",
}

func (k Kind) String() string { return kindNames[k] }

// Mount is one mount of a container, with what becomes of it.
type Mount struct {
	Kind        Kind
	Destination string
	// Source is the path on the host; unused with kinds that take nothing from there. A PodFile without one is written from
	// the pod's configuration.
	Source string
	// Options for the guest.
	Options []string
	// Filesystem is the type of a GuestFilesystem.
	Filesystem string
	// Volume is the source taken apart, with the kinds from Copied on.
	Volume volumes.Path
	// OrLive says that the VM shares what the host has, so that what cannot be brought in another way may be shared.
	OrLive bool
	// IDs is the map of the container's user namespace, if what is mounted shall be seen under its ids.
	IDs idmap.Map
	// ReadonlyRoot says of an ImageVolume that the container's root filesystem is read-only.
	ReadonlyRoot bool
	// Reason is why a mount is Refused.
	Reason string
}

func (m Mount) refuse(reason string) Mount {
	m.Kind, m.Reason = Refused, reason
	return m
}

const (
	// podShm is where containers that share the pod's ipc namespace have its shared memory.
	podShm = "/dev/shm"
	// cgroupRoot is the host's cgroup tree; a container sees its guest's.
	cgroupRoot = "/sys/fs/cgroup"
)

// podFiles are the files that containerd and nerdctl make for each container. They are small and copied: programs in
// the guest may rewrite them as they may in any container.
var podFiles = []string{"/etc/hosts", "/etc/hostname", "/etc/resolv.conf"}

// guestFilesystems are what the guest's kernel provides without anything from the host.
var guestFilesystems = []string{"proc", "sysfs", "tmpfs", "devpts", "mqueue", "cgroup", "cgroup2", "ramfs"}

// Plan classifies all mounts of a container, in order. With own it adds the pod's files that the container does not bring
// mounts of its own for, and makes the private /dev/shm that every specification begins with the pod's, if the container
// shares the pod's ipc namespace. It touches nothing.
func Plan(spec *specs.Spec, s Sharing, own bool) []Mount {
	readonly := spec.Root != nil && spec.Root.Readonly
	ids := ocispec.IDs(spec)
	shm := own && spec.Linux != nil && slices.ContainsFunc(spec.Linux.Namespaces, func(ns specs.LinuxNamespace) bool {
		return ns.Type == specs.IPCNamespace && ns.Path != ""
	})
	var all []Mount
	taken := map[string]bool{}
	for _, m := range spec.Mounts {
		destination := filepath.Clean(m.Destination)
		taken[destination] = true
		if shm && destination == podShm && m.Type == "tmpfs" && m.Source == "shm" {
			all = append(all, Mount{Kind: PodShm, Destination: podShm, Options: []string{"nosuid", "noexec", "nodev", "rw"}})
			continue
		}
		planned := Classify(m, s).mapped(m, ids)
		planned.ReadonlyRoot = planned.Kind == ImageVolume && readonly
		all = append(all, planned)
	}
	if !own {
		return all
	}
	access := "rw"
	if readonly {
		access = "ro"
	}
	for _, destination := range podFiles {
		if !taken[destination] {
			all = append(all, Mount{Kind: PodFile, Destination: destination, Options: []string{"rprivate", access}, IDs: ids})
		}
	}
	return all
}

// Refusals returns why mounts of a container cannot be had, all of them; none if they can.
func Refusals(all []Mount) []string {
	var reasons []string
	for _, m := range all {
		if m.Kind == Refused {
			reasons = append(reasons, m.Reason)
		}
	}
	if len(all) > wire.MaxMounts {
		reasons = append(reasons, fmt.Sprintf("%d mounts; the limit is %d", len(all), wire.MaxMounts))
	}
	return reasons
}

// Classify says what becomes of one mount in a VM that shares so much with the host, as far as the words tell. It touches
// nothing.
func Classify(m specs.Mount, s Sharing) Mount {
	out := Mount{Destination: m.Destination, Source: m.Source, Options: guestOptions(m.Options)}
	if fault := malformed(m); fault != "" {
		return out.refuse(fmt.Sprintf("mount of %s (type %q) at %s: %s", m.Source, m.Type, m.Destination, fault))
	}
	source, destination := filepath.Clean(m.Source), filepath.Clean(m.Destination)
	switch {
	case !isBind(m):
		out.Kind, out.Filesystem = GuestFilesystem, m.Type
	case destination == podShm:
		out.Kind = PodShm
	case source == cgroupRoot || strings.HasPrefix(source, cgroupRoot+"/"):
		out.Kind = CgroupView
	case slices.Contains(podFiles, destination):
		out.Kind = PodFile
	case s.Live():
		return out.live()
	default:
		return out.apart(s)
	}
	return out
}

// mapped adds under which ids the container sees what is mounted: those of its user namespace, or the host's.
func (m Mount) mapped(from specs.Mount, ids idmap.Map) Mount {
	own := idmap.Of(from.UIDMappings, from.GIDMappings)
	if own.IsZero() && slices.Contains(from.Options, "idmap") {
		own = ids
		if ids.IsZero() {
			return m.refuse(fmt.Sprintf("mount of %s at %s, option idmap: the container has no user namespace whose ids could be meant",
				m.Source, m.Destination))
		}
	}
	switch {
	case own.IsZero() || m.Kind == Refused:
		return m
	case m.Kind == GuestFilesystem || m.Kind == CgroupView:
		return m.refuse(fmt.Sprintf("mount of %s at %s: leave uidMappings and gidMappings out: they are of volumes only",
			m.Source, m.Destination))
	case own != ids:
		return m.refuse(fmt.Sprintf("mount of %s at %s: its ids are mapped by %s, and only the map of the container's user namespace "+
			"can be had (%s)", m.Source, m.Destination, own, ids))
	}
	m.IDs = own
	return m
}

// live classifies a bind mount for a VM that can share what the host has. Volumes that are the pod's own are better off in the
// guest all the same: ConfigMaps and their like show their changes to programs that wait for them, which no file system of the
// host does, and an emptyDir is a file system as any other, for sockets, locks and all containers of the pod.
func (m Mount) live() Mount {
	m.Kind, m.OrLive = Live, true
	m.Volume = volumes.Parse(m.Source)
	if kind, own := ownVolumes[m.Volume.Kind]; own {
		m.Kind = kind
	} else if reason := follows(m); reason != "" {
		return m.refuse(reason)
	}
	return m
}

// ownVolumes are the volumes that are the guest's own in every VM, and what becomes of them.
var ownVolumes = map[volumes.Kind]Kind{volumes.Copied: Copied, volumes.SubPath: Part, volumes.Scratch: Scratch}

// follows returns why a live mount cannot be had that is to follow what the host mounts below it; empty for others.
func follows(m Mount) string {
	if !slices.Contains(m.Options, "rslave") && !slices.Contains(m.Options, "slave") {
		return ""
	}
	return fmt.Sprintf("mountPropagation HostToContainer of %s at %s: use None: the VM would keep what the host mounts there later busy, "+
		"so that the host could not unmount it", m.Source, m.Destination)
}

// apart classifies a bind mount for a VM that shares nothing with the host: small volumes are copied, empty ones are made
// by the guest, and everything else is refused.
func (m Mount) apart(s Sharing) Mount {
	const instead = "bring the data in the image, a ConfigMap, a Secret or an emptyDir, or fetch it over the network"
	m.Volume = volumes.Parse(m.Source)
	if kind, own := ownVolumes[m.Volume.Kind]; own {
		m.Kind = kind
		return m
	}
	switch p := m.Volume; p.Kind {
	case volumes.TerminationLog:
		m.Kind = TerminationLog
	case volumes.ImageVolume:
		m.Kind = ImageVolume
	case volumes.Foreign:
		return m.refuse(fmt.Sprintf("volume %s (%s) at %s, from %s: %s; %s",
			p.Volume, p.Plugin, m.Destination, m.Source, s.Reason(), instead))
	default:
		return m.refuse(fmt.Sprintf("bind mount of %s at %s (hostPath): %s; %s", m.Source, m.Destination, s.Reason(), instead))
	}
	return m
}

// isBind reports whether a mount brings a file or directory of the host.
func isBind(m specs.Mount) bool {
	return m.Type == "bind" || slices.Contains(m.Options, "bind") || slices.Contains(m.Options, "rbind")
}

// malformed returns what is wrong with a mount in any VM, empty if nothing is.
func malformed(m specs.Mount) string {
	switch {
	case !filepath.IsAbs(m.Destination):
		return "the destination is not an absolute path"
	case isBind(m):
		if !filepath.IsAbs(m.Source) {
			return "the source is not an absolute path"
		}
		if slices.Contains(m.Options, "rshared") || slices.Contains(m.Options, "shared") {
			return "mounts made in a VM cannot propagate to the host (mountPropagation Bidirectional); use None"
		}
	case !slices.Contains(guestFilesystems, m.Type):
		return "this type of mount is not known; known are bind and " + strings.Join(guestFilesystems, ", ")
	}
	return ""
}

// guestOptions leaves out the words that only say where a mount comes from.
func guestOptions(options []string) []string {
	return slices.DeleteFunc(slices.Clone(options), func(o string) bool {
		return o == "bind" || o == "rbind" || o == "loop" || o == "idmap"
	})
}
