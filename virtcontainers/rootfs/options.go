// SPDX-License-Identifier: Apache-2.0

package rootfs

import (
	"fmt"
	"math"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/cloister-project/cloister/internal/idmap"
)

// Prefixes of options that are for containerd's mount manager (containerd docs/mounts.md).
const (
	prefixContainerd = "X-containerd."
	prefixMkdir      = prefixContainerd + "mkdir."
	prefixMkfs       = prefixContainerd + "mkfs."
	optionDMVerity   = prefixContainerd + "dmverity="
)

// Limits of what a request may hold. Sizes are bytes.
const (
	maxMounts    = MaxLayers + 16
	maxOptions   = 2*MaxLayers + 64
	maxOptionLen = 256 << 10 // a lowerdir= with 500 long paths
)

// harmless are options that change nothing in what a container sees of its read-only layers, or speak about the upper layer,
// which is the guest's.
var harmless = []string{
	"defaults", "loop", "async", "relatime", "norelatime", "noatime", "atime", "nodiratime", "diratime", "strictatime",
	"dev", "suid", "exec",
	"rprivate", "private", "rslave", "slave",
}

// isHarmless is harmless, and what overlayfs can be told about its upper layer, inode numbers and indexes.
func isHarmless(option string) bool {
	if slices.Contains(harmless, option) || option == "volatile" {
		return true
	}
	key, value, ok := strings.Cut(option, "=")
	if !ok {
		return false
	}
	switch key {
	case "index", "nfs_export":
		return value == "on" || value == "off"
	case "xino":
		return value == "on" || value == "off" || value == "auto"
	case "uuid":
		return value == "on" || value == "off" || value == "auto" || value == "null"
	}
	return false
}

func unknownOption(mountType, option string) error {
	what := fmt.Sprintf("option %q of a mount of type %q is not understood", option, mountType)
	switch key, _, _ := strings.Cut(option, "="); key {
	case "noexec", "nosuid", "nodev":
		return fmt.Errorf("%s: it cannot be kept for a root filesystem; take it out of the snapshotter's mount options: %w",
			what, errdefs.ErrNotImplemented)
	}
	return fmt.Errorf("%s; take it out of the snapshotter's mount options: %w", what, errdefs.ErrNotImplemented)
}

// overlayOptions are those of an overlay mount.
type overlayOptions struct {
	lowers   []string // topmost first; may hold templates
	upper    string
	work     string
	readOnly bool
	// merge are the options that decide what lower directories show: userxattr, redirect_dir=, metacopy=, verity=. Sorted.
	merge []string
}

func (o *overlayOptions) userXattr() bool { return slices.Contains(o.merge, "userxattr") }

func parseOverlayOptions(mountType string, options []string) (*overlayOptions, error) {
	o := new(overlayOptions)
	for _, option := range options {
		key, value, _ := strings.Cut(option, "=")
		switch {
		case option == "ro":
			o.readOnly = true
		case option == "rw":
			o.readOnly = false
		case key == "lowerdir":
			lowers, err := splitLowers(value)
			if err != nil {
				return nil, err
			}
			o.lowers = lowers // as for mount(8), the last one counts
		case key == "lowerdir+":
			o.lowers = append(o.lowers, value)
		case key == "upperdir":
			o.upper = unescape(value)
		case key == "workdir":
			o.work = unescape(value)
		case option == "userxattr",
			key == "redirect_dir" && slices.Contains([]string{"on", "off", "follow", "nofollow"}, value),
			key == "metacopy" && (value == "on" || value == "off"),
			key == "verity" && slices.Contains([]string{"on", "off", "require"}, value):
			o.merge = append(o.merge, option)
		case strings.HasPrefix(option, prefixMkdir+"path="):
			// Directories of the upper layer, which is the guest's.
		case isHarmless(option):
		default:
			return nil, unknownOption(mountType, option)
		}
	}
	slices.Sort(o.merge)
	o.merge = slices.Compact(o.merge)
	if len(o.lowers) > MaxLayers {
		return nil, fmt.Errorf("%d layers are more than the %d that overlayfs takes: %w", len(o.lowers), MaxLayers, errdefs.ErrInvalidArgument)
	}
	return o, nil
}

// splitLowers cuts a list of directories at colons; a backslash takes the next character as it is (overlayfs.rst).
func splitLowers(list string) ([]string, error) {
	var out []string
	var b strings.Builder
	for i := 0; i < len(list); i++ {
		switch ch := list[i]; {
		case ch == '\\' && i+1 < len(list):
			i++
			b.WriteByte(list[i])
		case ch == ':':
			out = append(out, b.String())
			b.Reset()
		default:
			b.WriteByte(ch)
		}
	}
	out = append(out, b.String())
	if slices.Contains(out, "") {
		return nil, fmt.Errorf("lowerdir=%.200s has an empty element; data-only layers (::) are not supported: %w", list,
			errdefs.ErrNotImplemented)
	}
	return out, nil
}

func unescape(path string) string {
	if !strings.Contains(path, `\`) {
		return path
	}
	var b strings.Builder
	for i := 0; i < len(path); i++ {
		if path[i] == '\\' && i+1 < len(path) {
			i++
		}
		b.WriteByte(path[i])
	}
	return b.String()
}

// cutIDMap takes the options out that say how the owners of files are to be mapped for a user namespace. Snapshotters give both.
func cutIDMap(options []string) (ids idmap.Map, rest []string, err error) {
	for _, option := range options {
		key, value, _ := strings.Cut(option, "=")
		switch key {
		case "uidmap":
			ids.UIDs = value
		case "gidmap":
			ids.GIDs = value
		default:
			rest = append(rest, option)
		}
	}
	if (ids.UIDs == "") != (ids.GIDs == "") {
		return ids, nil, fmt.Errorf("of the options uidmap= and gidmap= one is missing or empty: %w", errdefs.ErrInvalidArgument)
	}
	return ids, rest, nil
}

// parseBindOptions reports whether a bind mount is read-only.
func parseBindOptions(mountType string, options []string) (readOnly bool, err error) {
	for _, option := range options {
		switch {
		case option == "ro":
			readOnly = true
		case option == "rw":
			readOnly = false
		case option == "bind", option == "rbind":
		case strings.HasPrefix(option, prefixMkdir+"path="):
		case option != "volatile" && isHarmless(option):
		default:
			return false, unknownOption(mountType, option)
		}
	}
	return readOnly, nil
}

// parseImageOptions returns the further devices of an image.
func parseImageOptions(source string, options []string) (extra []string, err error) {
	for _, option := range options {
		key, value, _ := strings.Cut(option, "=")
		switch {
		case strings.HasPrefix(option, optionDMVerity):
			return nil, fmt.Errorf("the layer %s is protected by dm-verity (%s), which is not supported yet; set dmverity_mode = \"off\" "+
				"for containerd's erofs snapshotter, or unpack the image without enable_dmverity: %w", source, option, errdefs.ErrNotImplemented)
		case key == "device":
			if err := cleanPath("device of an image", value); err != nil {
				return nil, err
			}
			extra = append(extra, value)
		case option == "ro", key == "cache_strategy":
		case isHarmless(option):
		default:
			return nil, unknownOption("erofs", option)
		}
	}
	return extra, nil
}

// parseMkfsOptions returns the size of the writable image that is asked for. The image itself is never made.
func parseMkfsOptions(mountType string, options []string) (size int64, readOnly bool, err error) {
	for _, option := range options {
		mkfs, isMkfs := strings.CutPrefix(option, prefixMkfs)
		key, value, _ := strings.Cut(mkfs, "=")
		switch {
		case isMkfs && key == "size":
			if size, err = parseSize(value); err != nil {
				return 0, false, fmt.Errorf("option %q: %w", option, err)
			}
		case isMkfs && (key == "fs" || key == "uuid"):
		case option == "ro":
			readOnly = true
		case option == "rw":
			readOnly = false
		case isHarmless(option):
		default:
			return 0, false, unknownOption(mountType, option)
		}
	}
	return size, readOnly, nil
}

// parseSize reads a size as containerd's mkfs does: bytes, or with a binary suffix ("20GiB", "512m").
func parseSize(s string) (int64, error) {
	digits := s
	for i, ch := range s {
		if ch < '0' || ch > '9' {
			digits = s[:i]
			break
		}
	}
	n, err := strconv.ParseInt(digits, 10, 64)
	if err != nil {
		return 0, fmt.Errorf("size %q is not a number: %w", s, errdefs.ErrInvalidArgument)
	}
	suffix := strings.TrimSuffix(strings.TrimSuffix(strings.ToLower(strings.TrimSpace(s[len(digits):])), "b"), "i")
	shift := strings.Index("kmgtp", suffix)
	if suffix == "" {
		shift = -1
	} else if shift < 0 || len(suffix) != 1 {
		return 0, fmt.Errorf("size %q has an unknown unit: %w", s, errdefs.ErrInvalidArgument)
	}
	factor := int64(1) << (10 * (shift + 1))
	if n < 0 || n > math.MaxInt64/factor {
		return 0, fmt.Errorf("size %q is too large: %w", s, errdefs.ErrInvalidArgument)
	}
	return n * factor, nil
}

// cleanPath refuses paths that depend on anything but the filesystem.
func cleanPath(what, path string) error {
	if !filepath.IsAbs(path) || filepath.Clean(path) != path || strings.ContainsRune(path, 0) {
		return fmt.Errorf("%s: %q is not an absolute, clean path: %w", what, path, errdefs.ErrInvalidArgument)
	}
	return nil
}
