// SPDX-License-Identifier: Apache-2.0

package volumes

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/moby/sys/mountinfo"
)

// SubPathOf finds the volume that a part of was mounted at path, which is of kind SubPath. The kubelet's mount shows no
// more than a file system and a place in it; the volume is the one of the pod with this name that the place lies in.
// errdefs.ErrNotFound: none.
func SubPathOf(p Path, path string) (Path, error) {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return Path{}, err
	}
	defer f.Close()
	return subPathOf(f, p, path)
}

func subPathOf(table io.Reader, p Path, path string) (Path, error) {
	mounts, err := mountinfo.GetMountsFromReader(table, nil)
	if err != nil {
		return Path{}, fmt.Errorf("mounts of the host: %w", err)
	}
	path = filepath.Clean(path)
	part := within(mounts, path)
	if part == nil || part.Mountpoint != path {
		return Path{}, fmt.Errorf("%s is no mount: %w", path, errdefs.ErrNotFound)
	}
	// The kubelet may have replaced the file since.
	place := strings.TrimSuffix(part.Root, "//deleted")
	plugins, err := os.ReadDir(filepath.Join(p.Pod, "volumes"))
	if err != nil {
		return Path{}, fmt.Errorf("volumes of the pod: %w", err)
	}
	for _, plugin := range plugins {
		dir := filepath.Join(p.Pod, "volumes", plugin.Name(), p.Volume)
		if info, err := os.Lstat(dir); err != nil || !info.IsDir() {
			continue
		}
		m := within(mounts, dir)
		if m == nil || m.Major != part.Major || m.Minor != part.Minor {
			continue
		}
		rel, err := filepath.Rel(m.Mountpoint, dir)
		if err != nil {
			continue
		}
		root := filepath.Join(m.Root, rel)
		if rest, ok := strings.CutPrefix(place, strings.TrimSuffix(root, "/")+"/"); ok || place == root {
			found := Parse(dir)
			found.Rest = rest
			if place == root {
				found.Rest = ""
			}
			return found, nil
		}
	}
	return Path{}, fmt.Errorf("%s lies in no volume of the pod that is called %s: %w", path, p.Volume, errdefs.ErrNotFound)
}

// within finds the mount that a path lies in: of those with the longest mount point, the last one, which hides the others.
func within(mounts []*mountinfo.Info, path string) *mountinfo.Info {
	var best *mountinfo.Info
	for _, m := range mounts {
		inside := m.Mountpoint == "/" || path == m.Mountpoint || strings.HasPrefix(path, m.Mountpoint+"/")
		if inside && (best == nil || len(m.Mountpoint) >= len(best.Mountpoint)) {
			best = m
		}
	}
	return best
}
