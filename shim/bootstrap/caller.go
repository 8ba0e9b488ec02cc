// SPDX-License-Identifier: Apache-2.0

package bootstrap

import (
	"debug/buildinfo"
	"strings"
)

const containerdModule = "github.com/containerd/containerd"

// MajorVersion reads from a Go binary which major version of containerd it is, or has in it; 0 if that cannot be told.
func MajorVersion(binary string) int {
	if binary == "" {
		return 0
	}
	info, err := buildinfo.ReadFile(binary)
	if err != nil {
		return 0
	}
	paths := []string{info.Path, info.Main.Path}
	for _, d := range info.Deps {
		paths = append(paths, d.Path)
	}
	return majorOf(paths)
}

// majorOf decides by packages' and modules' paths. A build without modules, as Debian makes them, has only the main
// package's.
func majorOf(paths []string) int {
	for _, p := range paths {
		rest, ok := strings.CutPrefix(p, containerdModule)
		switch {
		case !ok:
		case rest == "/v2" || strings.HasPrefix(rest, "/v2/"):
			return 2
		case rest == "" || strings.HasPrefix(rest, "/cmd/"):
			return 1
		}
	}
	return 0
}
