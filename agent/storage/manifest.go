// SPDX-License-Identifier: Apache-2.0

package storage

import (
	"fmt"
	"math"
	"path"
	"strings"

	"github.com/containerd/errdefs"

	agentv1 "github.com/cloister-project/cloister/agent-protocol/v1"
	"github.com/cloister-project/cloister/agent-protocol/wire"
)

// validVolumeName is the rule of agentv1.PutVolumeRequest.name, for scratch volumes too.
func validVolumeName(s string) bool {
	const longest = 64
	return s != "" && len(s) <= longest && s[0] != '.' && strings.IndexFunc(s, func(c rune) bool {
		return !(c >= 'a' && c <= 'z' || c >= '0' && c <= '9' || c == '.' || c == '-')
	}) < 0
}

// checkVolumePath takes clean relative paths. No element starts with "..": names that do are the layout's own.
func checkVolumePath(p string) error {
	const longestElement = 255 // NAME_MAX
	bad := p == "" || p == "." || len(p) > wire.MaxVolumePath || strings.ContainsRune(p, 0) || path.IsAbs(p) || path.Clean(p) != p
	for e := range strings.SplitSeq(p, "/") {
		bad = bad || len(e) > longestElement || strings.HasPrefix(e, "..")
	}
	if bad {
		return fmt.Errorf("path %.80q in a volume is not a clean relative one of at most %d bytes without elements that start with \"..\": %w",
			p, wire.MaxVolumePath, errdefs.ErrInvalidArgument)
	}
	return nil
}

// checkPut checks all that can be told from the request alone.
func checkPut(r *agentv1.PutVolumeRequest) error {
	if !validVolumeName(r.GetName()) {
		return fmt.Errorf("name of a volume %.80q is not 1 to 64 of [a-z0-9.-], not starting with a dot: %w", r.GetName(),
			errdefs.ErrInvalidArgument)
	}
	if r.GetGeneration() == 0 {
		return fmt.Errorf("volume %s: generations begin with 1: %w", r.GetName(), errdefs.ErrInvalidArgument)
	}
	// Each part is a file, or a chunk of one, or both.
	const mostParts = wire.MaxVolumeFiles + wire.MaxVolumeBytes/wire.MaxVolumeChunk
	if n := len(r.GetFiles()); n > mostParts {
		return fmt.Errorf("volume %s: %d parts of files in a request, the limit is %d: %w", r.GetName(), n, mostParts, errdefs.ErrInvalidArgument)
	}
	sum := 0
	for _, f := range r.GetFiles() {
		if err := checkVolumePath(f.GetPath()); err != nil {
			return fmt.Errorf("volume %s: %w", r.GetName(), err)
		}
		if f.GetUid() == math.MaxUint32 || f.GetGid() == math.MaxUint32 { // (uid_t)-1, "leave as it is" to chown
			return fmt.Errorf("volume %s: owner %d:%d of %.80q: %w", r.GetName(), f.GetUid(), f.GetGid(), f.GetPath(), errdefs.ErrInvalidArgument)
		}
		sum += len(f.GetContent())
	}
	if sum > wire.MaxVolumeChunk {
		return fmt.Errorf("volume %s: %d bytes in a request, the limit is %d: %w", r.GetName(), sum, wire.MaxVolumeChunk,
			errdefs.ErrInvalidArgument)
	}
	return nil
}

// manifest is what a generation of a volume has been given.
type manifest struct {
	files map[string]uint64 // sizes so far
	dirs  map[string]bool
	bytes uint64
}

func newManifest() *manifest {
	return &manifest{files: map[string]uint64{}, dirs: map[string]bool{}}
}

// add records a part that passed checkPut and reports whether it begins a file.
func (m *manifest) add(f *agentv1.VolumeFile) (begins bool, err error) {
	p := f.GetPath()
	size, known := m.files[p]
	switch {
	case known && f.GetOffset() == 0:
		return false, fmt.Errorf("file %q is there twice: %w", p, errdefs.ErrInvalidArgument)
	case f.GetOffset() != size:
		return false, fmt.Errorf("part at offset %d of file %q, of which there are %d bytes: %w", f.GetOffset(), p, size,
			errdefs.ErrInvalidArgument)
	case m.dirs[p]:
		return false, fmt.Errorf("%q is a directory and a file: %w", p, errdefs.ErrInvalidArgument)
	case !known && len(m.files) >= wire.MaxVolumeFiles:
		return false, fmt.Errorf("more than %d files: %w", wire.MaxVolumeFiles, errdefs.ErrInvalidArgument)
	case m.bytes+uint64(len(f.GetContent())) > wire.MaxVolumeBytes:
		return false, fmt.Errorf("more than %d bytes: %w", wire.MaxVolumeBytes, errdefs.ErrInvalidArgument)
	}
	for dir := path.Dir(p); dir != "."; dir = path.Dir(dir) {
		if _, isFile := m.files[dir]; isFile {
			return false, fmt.Errorf("%q is a file and a directory: %w", dir, errdefs.ErrInvalidArgument)
		}
		if m.dirs[dir] {
			break
		}
		if len(m.dirs) >= wire.MaxVolumeFiles {
			return false, fmt.Errorf("more than %d directories: %w", wire.MaxVolumeFiles, errdefs.ErrInvalidArgument)
		}
		m.dirs[dir] = true
	}
	m.bytes += uint64(len(f.GetContent()))
	m.files[p] = size + uint64(len(f.GetContent()))
	return !known, nil
}

// topNames are the first elements of all paths.
func (m *manifest) topNames() map[string]bool {
	names := map[string]bool{}
	for p := range m.files {
		first, _, _ := strings.Cut(p, "/")
		names[first] = true
	}
	return names
}
