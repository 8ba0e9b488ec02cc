// SPDX-License-Identifier: Apache-2.0

package firmware

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
)

// Features of descriptors by which the platforms find their firmware.
const (
	FeatureSNP = "amd-sev-snp"
	FeatureTDX = "intel-tdx"
)

// DescriptorDirs are the directories of descriptors, the administrator's in front of the distribution's.
func DescriptorDirs() []string { return []string{"/etc/qemu/firmware", "/usr/share/qemu/firmware"} }

const (
	maxDescriptor  = 64 << 10
	maxDescriptors = 1024
)

// Descriptor is what counts here of a firmware descriptor, QEMU docs/interop/firmware.json.
type Descriptor struct {
	Description string `json:"description"`
	Mapping     struct {
		Device   string `json:"device"`
		Filename string `json:"filename"`
	} `json:"mapping"`
	Targets []struct {
		Architecture string   `json:"architecture"`
		Machines     []string `json:"machines"`
	} `json:"targets"`
	Features []string `json:"features"`
}

// ParseDescriptor reads a descriptor. Fields that are not known are passed over, as the format's own rules want it.
// errdefs.ErrInvalidArgument: it is none.
func ParseDescriptor(raw []byte) (*Descriptor, error) {
	if len(raw) > maxDescriptor {
		return nil, fmt.Errorf("a firmware descriptor of %d bytes, more than %d: %w", len(raw), maxDescriptor, errdefs.ErrInvalidArgument)
	}
	var d Descriptor
	dec := json.NewDecoder(bytes.NewReader(raw))
	if err := dec.Decode(&d); err != nil {
		return nil, fmt.Errorf("no firmware descriptor: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	if dec.More() {
		return nil, fmt.Errorf("no firmware descriptor: something follows its end: %w", errdefs.ErrInvalidArgument)
	}
	return &d, nil
}

// Fits reports whether the descriptor is one of a stateless image for x86-64 q35 machines with that feature, and what is in
// the way if not.
func (d *Descriptor) Fits(feature string) (reason string, ok bool) {
	switch {
	case !slices.Contains(d.Features, feature):
		return fmt.Sprintf("no feature %s", feature), false
	case d.Mapping.Device != "memory":
		return fmt.Sprintf("mapping.device is %q, not \"memory\": confidential VMs have no flash", d.Mapping.Device), false
	case !filepath.IsAbs(d.Mapping.Filename) || strings.ContainsRune(d.Mapping.Filename, 0):
		return fmt.Sprintf("mapping.filename %q is no absolute path", d.Mapping.Filename), false
	}
	for _, t := range d.Targets {
		if t.Architecture == "x86_64" && slices.ContainsFunc(t.Machines, isQ35) {
			return "", true
		}
	}
	return "no target x86_64 with a q35 machine", false
}

// isQ35 reports whether a pattern of machine names takes in versions of q35.
func isQ35(pattern string) bool {
	if strings.HasPrefix(pattern, "pc-q35-") {
		return true
	}
	for _, name := range []string{"q35", "pc-q35-10.0"} {
		if ok, err := path.Match(pattern, name); err == nil && ok {
			return true
		}
	}
	return false
}

// Find returns the path of the firmware image of the first fitting descriptor. Descriptors are taken in the order of their
// file names over all directories; one of the same name in a later directory is masked by the earlier one, and an empty file
// masks without being one. errdefs.ErrNotFound tells what was looked at and why nothing fits.
func Find(dirs []string, feature string) (string, error) {
	files, err := descriptorFiles(dirs)
	if err != nil {
		return "", err
	}
	var seen []string
	for _, file := range files {
		raw, _, err := ReadFile(file, maxDescriptor)
		if err != nil {
			seen = append(seen, err.Error())
			continue
		}
		if len(raw) == 0 {
			continue
		}
		d, err := ParseDescriptor(raw)
		if err != nil {
			seen = append(seen, fmt.Sprintf("%s: %v", file, err))
			continue
		}
		reason, ok := d.Fits(feature)
		if ok {
			return d.Mapping.Filename, nil
		}
		seen = append(seen, fmt.Sprintf("%s: %s", file, reason))
	}
	detail := "there are no descriptors"
	if len(seen) > 0 {
		detail = strings.Join(seen, "; ")
	}
	return "", fmt.Errorf("no firmware descriptor with feature %s in %s (%s): %w", feature, strings.Join(dirs, ", "), detail,
		errdefs.ErrNotFound)
}

// descriptorFiles lists the files that are not masked, in the order of their names.
func descriptorFiles(dirs []string) ([]string, error) {
	byName := map[string]string{}
	for _, dir := range dirs {
		entries, err := os.ReadDir(dir)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("firmware descriptors: %w", err)
		}
		for _, e := range entries {
			if _, masked := byName[e.Name()]; masked || !strings.HasSuffix(e.Name(), ".json") {
				continue
			}
			if len(byName) == maxDescriptors {
				return nil, fmt.Errorf("firmware descriptors: more than %d files in %s: %w", maxDescriptors, strings.Join(dirs, ", "),
					errdefs.ErrInvalidArgument)
			}
			byName[e.Name()] = filepath.Join(dir, e.Name())
		}
	}
	files := make([]string, 0, len(byName))
	for _, name := range slices.Sorted(maps.Keys(byName)) {
		files = append(files, byName[name])
	}
	return files, nil
}
