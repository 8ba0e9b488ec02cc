// SPDX-License-Identifier: Apache-2.0

package volumes

import (
	"cmp"
	"path/filepath"
	"regexp"
	"strings"
)

// Kind is what a path of the host is.
type Kind int

// Kinds.
const (
	// Other is none of the rest: a file or directory of the host.
	Other Kind = iota
	// Copied is a ConfigMap, Secret, projected or downward-API volume, or something in it.
	Copied
	// Scratch is an emptyDir, or something in it.
	Scratch
	// Foreign is a volume of another kind: persistent, CSI, NFS and so on.
	Foreign
	// SubPath is a part of a volume, mounted by the kubelet for one container (subPath).
	SubPath
	// TerminationLog is the file that a container's termination message is read from.
	TerminationLog
	// ImageVolume is a directory made by containerd for a VOLUME of the image.
	ImageVolume
)

// Path is a path taken apart.
type Path struct {
	Kind Kind
	// Pod is the directory of the pod, <root>/pods/<uid>; empty with Other and ImageVolume.
	Pod string
	// Plugin is the kind of volume in the kubelet's words, "kubernetes.io~secret"; with Copied, Scratch and Foreign.
	Plugin string
	// Volume is the volume's name in the pod; with Copied, Scratch, Foreign and SubPath.
	Volume string
	// Rest is the path below the volume, if it is not the volume itself. For what the AtomicWriter wrote it is the path that
	// users of the volume see, below its links.
	Rest string
}

// Dir is the volume's directory.
func (p Path) Dir() string { return filepath.Join(p.Pod, "volumes", p.Plugin, p.Volume) }

// plugins are the kinds of volumes that are told apart, by the key in a Pod's manifest and by the kubelet's word.
var plugins = []struct {
	source, name string
	kind         Kind
}{
	{"configMap", "kubernetes.io~configmap", Copied},
	{"secret", "kubernetes.io~secret", Copied},
	{"projected", "kubernetes.io~projected", Copied},
	{"downwardAPI", "kubernetes.io~downward-api", Copied},
	{"emptyDir", "kubernetes.io~empty-dir", Scratch},
}

// Plugin returns the kubelet's word (Path.Plugin) for a kind of volume by its key in a Pod's manifest, "configMap" for
// example. A kind that is not told apart gets one that Parse takes for Foreign.
func Plugin(source string) string {
	for _, p := range plugins {
		if p.source == source {
			return p.name
		}
	}
	word := strings.Map(func(r rune) rune {
		if r >= 'a' && r <= 'z' || r >= '0' && r <= '9' {
			return r
		}
		return '-'
	}, strings.ToLower(source))
	return "kubernetes.io~" + cmp.Or(word, "unknown")
}

var (
	// A pod's uid: a UUID, or a hash for those of a node's own files.
	uidPattern    = regexp.MustCompile(`^[A-Za-z0-9-]{8,64}$`)
	pluginPattern = regexp.MustCompile(`^[a-z0-9.-]+~[a-z0-9.-]+$`)
)

// Parse takes an absolute path apart by the kubelet's layout (k8s.io/kubernetes/pkg/kubelet/kubelet_getters.go) and that
// of containerd's CRI plugin. It looks at nothing but the words.
func Parse(path string) Path {
	path = filepath.Clean(path)
	words := strings.Split(path, "/")
	for i := len(words) - 1; i > 0; i-- {
		if words[i] != "pods" || i+2 >= len(words) || !uidPattern.MatchString(words[i+1]) {
			continue
		}
		if p, ok := parsePod(strings.Join(words[:i+2], "/"), words[i+2], words[i+3:]); ok {
			return p
		}
	}
	// <root>/io.containerd.*/containers/<id>/volumes/<name>
	if n := len(words); n > 5 && words[n-2] == "volumes" && words[n-4] == "containers" && strings.HasPrefix(words[n-5], "io.containerd.") {
		return Path{Kind: ImageVolume}
	}
	return Path{}
}

func parsePod(pod, what string, rest []string) (Path, bool) {
	switch {
	case what == "volumes" && len(rest) >= 2 && pluginPattern.MatchString(rest[0]) && rest[1] != "":
		p := Path{Kind: Foreign, Pod: pod, Plugin: rest[0], Volume: rest[1], Rest: strings.Join(rest[2:], "/")}
		for _, known := range plugins {
			if known.name == p.Plugin {
				p.Kind = known.kind
			}
		}
		if p.Kind == Copied {
			// containerd follows the AtomicWriter's links before it hands a path on.
			if top, below, _ := strings.Cut(p.Rest, "/"); strings.HasPrefix(top, "..") {
				p.Rest = below
			}
		}
		return p, true
	case what == "volume-subpaths" && len(rest) == 3:
		return Path{Kind: SubPath, Pod: pod, Volume: rest[0]}, true
	case what == "containers" && len(rest) == 2:
		return Path{Kind: TerminationLog, Pod: pod}, true
	}
	return Path{}, false
}
