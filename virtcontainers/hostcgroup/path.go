// SPDX-License-Identifier: Apache-2.0

package hostcgroup

import (
	"fmt"
	"path"
	"strings"

	"github.com/containerd/errdefs"
)

// defaultParent holds the cgroups of pods for which nobody names a place.
const defaultParent = "/cloister"

// maxPath is well below PATH_MAX, since mount points come before it.
const maxPath = 2048

// Path returns the cgroup for an OCI spec's linux.cgroupsPath: "/a/b" and "a/b" are /a/b, and systemd's "slice:prefix:name"
// is the directory of that scope. Empty, it is /cloister/<podID>. What is no path, or is the root itself, gives
// errdefs.ErrInvalidArgument.
func Path(cgroupsPath, podID string) (string, error) {
	if cgroupsPath == "" {
		return check(defaultParent+"/"+podID, podID)
	}
	if slice, rest, ok := strings.Cut(cgroupsPath, ":"); ok {
		prefix, name, ok := strings.Cut(rest, ":")
		if !ok || name == "" || strings.Contains(name, ":") {
			return "", fmt.Errorf("cgroupsPath %q is neither a path nor slice:prefix:name: %w", cgroupsPath, errdefs.ErrInvalidArgument)
		}
		dir, err := expandSlice(slice)
		if err != nil {
			return "", err
		}
		unit := name
		if !strings.HasSuffix(name, ".slice") {
			unit = name + ".scope"
			if prefix != "" {
				unit = prefix + "-" + unit
			}
		}
		if strings.Contains(unit, "/") {
			return "", fmt.Errorf("cgroupsPath %q: the unit's name has a slash: %w", cgroupsPath, errdefs.ErrInvalidArgument)
		}
		return check(dir+"/"+unit, cgroupsPath)
	}
	return check(cgroupsPath, cgroupsPath)
}

// Parent returns the cgroup of a pod below a CRI cgroup_parent, where containerd's own getCgroupsPath would put it: a
// parent whose last part ends in ".slice" is systemd's. Empty, it is /cloister/<podID>.
func Parent(cgroupParent, podID string) (string, error) {
	if cgroupParent == "" {
		return Path("", podID)
	}
	if base := path.Base(cgroupParent); strings.HasSuffix(base, ".slice") {
		return Path(base+":cri-containerd:"+podID, podID)
	}
	return Path(cgroupParent+"/"+podID, podID)
}

// expandSlice returns the directory of a slice: "a-b.slice" is /a.slice/a-b.slice (systemd.slice(5)). Empty, it is
// /system.slice; "-.slice" is the root.
func expandSlice(slice string) (string, error) {
	if slice == "" {
		return "/system.slice", nil
	}
	name, ok := strings.CutSuffix(slice, ".slice")
	if !ok || strings.Contains(name, "/") {
		return "", fmt.Errorf("cgroupsPath: %q is not a slice of systemd: %w", slice, errdefs.ErrInvalidArgument)
	}
	if name == "-" {
		return "", nil
	}
	var dir, prefix string
	for part := range strings.SplitSeq(name, "-") {
		if part == "" {
			return "", fmt.Errorf("cgroupsPath: %q is not a slice of systemd: %w", slice, errdefs.ErrInvalidArgument)
		}
		prefix += part
		dir += "/" + prefix + ".slice"
		prefix += "-"
	}
	return dir, nil
}

// check makes an absolute clean path of p, and refuses one that would leave the hierarchy or be its root.
func check(p, given string) (string, error) {
	clean := path.Clean("/" + p)
	switch {
	case clean == "/", len(clean) > maxPath, strings.ContainsFunc(p, func(r rune) bool { return r < ' ' || r == 0x7f }):
		return "", fmt.Errorf("%.80q is no path of a cgroup: %w", given, errdefs.ErrInvalidArgument)
	}
	for part := range strings.SplitSeq(p, "/") {
		if part == ".." || len(part) > 255 {
			return "", fmt.Errorf("%.80q is no path of a cgroup: %w", given, errdefs.ErrInvalidArgument)
		}
	}
	return clean, nil
}
