// SPDX-License-Identifier: Apache-2.0

package rootfs

import (
	"fmt"
	"strings"

	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"

	"github.com/cloister-project/cloister/internal/idmap"
)

// plan is what mounts ask for: ready images or a tree of directories, and an upper directory over either.
type plan struct {
	images        []image // topmost first
	tree          *tree
	empty         bool // the mounts say that there is no layer
	readOnly      bool
	writableBytes int64
	// ids say how the owners of all but what is in an upper directory are to be mapped.
	ids idmap.Map
}

// image is an image file of the erofs snapshotter.
type image struct {
	path  string
	extra []string
}

// tree is a stack of directories.
type tree struct {
	lowers []string // topmost first
	// upper is a directory in which somebody may have written; "" if there is none.
	upper string
	// merge options, see overlayOptions.
	merge     []string
	userXattr bool
}

// mountKind is what one mount is, without its transforms.
type mountKind int

const (
	kindImage    mountKind = iota // erofs
	kindWritable                  // a filesystem image for the upper layer
	kindOverlay
	kindBind
)

// element is one understood mount of a request.
type element struct {
	kind mountKind
	mount
	image image
	bytes int64 // of a writable image
	// readOnly of a bind mount.
	readOnly bool
	ids      idmap.Map
	used     bool // by a template
}

// mount is a types.Mount with its type taken apart.
type mount struct {
	base    string
	full    string
	source  string
	options []string
}

// parseMounts understands a whole request. It looks at no file.
func parseMounts(request []*types.Mount) (*plan, error) {
	if len(request) == 0 {
		return nil, fmt.Errorf("the request has no mounts: %w", errdefs.ErrInvalidArgument)
	}
	if len(request) > maxMounts {
		return nil, fmt.Errorf("%d mounts are more than %d: %w", len(request), maxMounts, errdefs.ErrInvalidArgument)
	}
	elements := make([]*element, 0, len(request))
	for i, m := range request {
		e, err := parseMount(m)
		if err != nil {
			return nil, fmt.Errorf("mount %d: %w", i, err)
		}
		elements = append(elements, e)
	}
	last := elements[len(elements)-1]
	p, err := parseLast(last, elements[:len(elements)-1])
	if err != nil {
		return nil, fmt.Errorf("mount %d: %w", len(elements)-1, err)
	}
	p.ids = last.ids
	for i, e := range elements[:len(elements)-1] {
		if !e.ids.IsZero() {
			return nil, fmt.Errorf("mount %d has uidmap= and gidmap=, which only the last one can have: %w", i, errdefs.ErrNotImplemented)
		}
		if !e.used {
			return nil, fmt.Errorf("mount %d (type %q, source %q) is used by no other: %w", i, e.full, e.source, errdefs.ErrInvalidArgument)
		}
	}
	return p, nil
}

func parseMount(m *types.Mount) (*element, error) {
	if m == nil {
		return nil, fmt.Errorf("it is empty: %w", errdefs.ErrInvalidArgument)
	}
	if m.Target != "" {
		return nil, fmt.Errorf("it has a target of its own (%q), which is not supported: %w", m.Target, errdefs.ErrNotImplemented)
	}
	length := len(m.Type) + len(m.Source)
	for _, o := range m.Options {
		length += len(o)
	}
	if len(m.Options) > maxOptions || length > maxOptionLen {
		return nil, fmt.Errorf("its options are too long: %w", errdefs.ErrInvalidArgument)
	}
	e := &element{mount: mount{full: m.Type, source: m.Source, options: m.Options}}
	parts := strings.Split(m.Type, "/")
	e.base = parts[len(parts)-1]
	var err error
	if e.base == "overlay" || e.base == "bind" {
		if e.ids, e.options, err = cutIDMap(m.Options); err != nil {
			return nil, err
		}
	}
	mkfs := false
	for _, transform := range parts[:len(parts)-1] {
		switch {
		case transform == "mkfs":
			mkfs = true
		case transform == "format", transform == "mkdir":
		default:
			return nil, fmt.Errorf("transform %q of type %q is not understood: %w", transform, m.Type, errdefs.ErrNotImplemented)
		}
	}
	switch {
	case e.base == "erofs" && len(parts) == 1:
		e.kind = kindImage
		e.image.path = m.Source
		if err := cleanPath("image", m.Source); err != nil {
			return nil, err
		}
		e.image.extra, err = parseImageOptions(m.Source, m.Options)
	case mkfs && len(parts) == 2, (e.base == "ext4" || e.base == "xfs") && len(parts) == 1:
		// Made on the host (containerd before the shim claimed mkfs) or not: the guest has its own.
		e.kind = kindWritable
		e.bytes, e.readOnly, err = parseMkfsOptions(m.Type, m.Options)
	case e.base == "overlay" && !mkfs:
		e.kind = kindOverlay
	case e.base == "bind" && !mkfs:
		e.kind = kindBind
		e.readOnly, err = parseBindOptions(m.Type, e.options)
	default:
		return nil, fmt.Errorf("type %q (source %q) is not supported; use the overlayfs or the erofs snapshotter for this runtime: %w",
			m.Type, m.Source, errdefs.ErrNotImplemented)
	}
	return e, err
}

// parseLast understands the mount that makes the root filesystem, over the ones before it.
func parseLast(last *element, before []*element) (*plan, error) {
	switch last.kind {
	case kindImage:
		return &plan{images: []image{last.image}, readOnly: true}, nil
	case kindBind:
		return parseBind(last, before)
	case kindOverlay:
		return parseOverlay(last, before)
	}
	return nil, fmt.Errorf("a writable image (type %q, source %q) cannot be a root filesystem by itself; "+
		"use the overlayfs or the erofs snapshotter for this runtime: %w", last.full, last.source, errdefs.ErrNotImplemented)
}

func parseBind(last *element, before []*element) (*plan, error) {
	if !hasTemplate(last.source) {
		if err := cleanPath("source of a bind mount", last.source); err != nil {
			return nil, err
		}
		if last.readOnly { // a committed snapshot, as a lower directory is
			return &plan{tree: &tree{lowers: []string{last.source}}, readOnly: true}, nil
		}
		return &plan{tree: &tree{upper: last.source}}, nil
	}
	ref, err := parseTemplate(last.source, len(before))
	if err != nil {
		return nil, err
	}
	if len(ref.mounts) != 1 {
		return nil, fmt.Errorf("the source %q is more than one mount: %w", last.source, errdefs.ErrInvalidArgument)
	}
	from := before[ref.mounts[0]]
	from.used = true
	switch {
	case from.kind == kindImage && ref.rest == "":
		return &plan{images: []image{from.image}, readOnly: true}, nil
	case from.kind == kindWritable: // a snapshot without layers, on a block device
		return &plan{empty: true, readOnly: last.readOnly || from.readOnly, writableBytes: from.bytes}, nil
	}
	return nil, fmt.Errorf("the source %q, a part of a mount of type %q, is not supported: %w", last.source, from.full,
		errdefs.ErrNotImplemented)
}

func parseOverlay(last *element, before []*element) (*plan, error) {
	o, err := parseOverlayOptions(last.full, last.options)
	if err != nil {
		return nil, err
	}
	p := &plan{readOnly: o.readOnly || o.upper == ""}
	for _, dir := range []struct {
		path   string
		toFill *string
	}{{o.upper, &o.upper}, {o.work, &o.work}} {
		if !hasTemplate(dir.path) {
			continue
		}
		ref, err := parseTemplate(dir.path, len(before))
		if err != nil {
			return nil, err
		}
		on := before[ref.mounts[0]]
		if len(ref.mounts) != 1 || on.kind != kindWritable {
			return nil, fmt.Errorf("upperdir or workdir %q is not on a writable image: %w", dir.path, errdefs.ErrInvalidArgument)
		}
		on.used = true
		p.writableBytes = on.bytes
		*dir.toFill = ""
	}
	if o.upper != "" {
		if err := cleanPath("upperdir", o.upper); err != nil {
			return nil, err
		}
	}
	var dirs []string
	for _, lower := range o.lowers {
		if !hasTemplate(lower) {
			if err := cleanPath("lowerdir", lower); err != nil {
				return nil, err
			}
			dirs = append(dirs, lower)
			continue
		}
		ref, err := parseTemplate(lower, len(before))
		if err != nil {
			return nil, err
		}
		for _, n := range ref.mounts {
			if before[n].kind != kindImage || ref.rest != "" || before[n].used {
				return nil, fmt.Errorf("lowerdir %q is not a whole image that is used once: %w", lower, errdefs.ErrInvalidArgument)
			}
			before[n].used = true
			p.images = append(p.images, before[n].image)
		}
	}
	switch {
	case len(dirs) > 0 && len(p.images) > 0:
		return nil, fmt.Errorf("lowerdir= mixes directories and images: %w", errdefs.ErrNotImplemented)
	case len(dirs) == 0 && len(p.images) == 0:
		return nil, fmt.Errorf("an overlay without lowerdir=: %w", errdefs.ErrInvalidArgument)
	case len(p.images) > 0:
		for _, option := range o.merge {
			if !strings.HasSuffix(option, "=off") && option != "redirect_dir=nofollow" {
				return nil, fmt.Errorf("option %q for layers of the erofs snapshotter is not supported; take it out of ovl_mount_options: %w",
					option, errdefs.ErrNotImplemented)
			}
		}
		if o.upper == "" {
			return p, nil
		}
	}
	p.tree = &tree{lowers: dirs, upper: o.upper, merge: o.merge, userXattr: o.userXattr()}
	return p, nil
}
