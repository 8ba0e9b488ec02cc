// SPDX-License-Identifier: Apache-2.0

package rootfs

import (
	"fmt"
	"strings"
	"testing"

	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"

	"github.com/cloister-project/cloister/internal/idmap"
)

func m(mountType, source string, options ...string) *types.Mount {
	return &types.Mount{Type: mountType, Source: source, Options: options}
}

// As containerd's snapshotters make them: plugins/snapshots/{overlay,erofs} of 2.4.2.
func TestParseMounts(t *testing.T) {
	const s = "/var/lib/containerd/snapshots/"
	layer := func(n int) string { return fmt.Sprintf("%s%d/layer.erofs", s, n) }
	erofs := func(n int) *types.Mount { return m("erofs", layer(n), "ro", "loop") }
	images := func(n ...int) (out []image) {
		for _, i := range n {
			out = append(out, image{path: layer(i)})
		}
		return out
	}
	for _, tc := range []struct {
		name   string
		mounts []*types.Mount
		want   *plan
	}{
		{"overlayfs, active", []*types.Mount{m("overlay", "overlay", "index=off", "workdir="+s+"9/work", "upperdir="+s+"9/fs",
			"lowerdir="+s+"2/fs:"+s+"1/fs")},
			&plan{tree: &tree{lowers: []string{s + "2/fs", s + "1/fs"}, upper: s + "9/fs"}}},
		{"overlayfs, view", []*types.Mount{m("overlay", "overlay", "lowerdir="+s+"2/fs:"+s+"1/fs", "ro")},
			&plan{tree: &tree{lowers: []string{s + "2/fs", s + "1/fs"}}, readOnly: true}},
		{"overlayfs, rootless options", []*types.Mount{m("overlay", "overlay", "volatile", "userxattr", "metacopy=on", "redirect_dir=on",
			"xino=off",
			"workdir=/w", "upperdir=/u", "lowerdir=/l")},
			&plan{tree: &tree{lowers: []string{"/l"}, upper: "/u", merge: []string{"metacopy=on", "redirect_dir=on", "userxattr"},
				userXattr: true}}},
		{"overlayfs, escapes", []*types.Mount{m("overlay", "overlay", `lowerdir=/a\:b:/c\\d`)},
			&plan{tree: &tree{lowers: []string{"/a:b", `/c\d`}}, readOnly: true}},
		{"overlayfs, appended", []*types.Mount{m("overlay", "overlay", "lowerdir+=/a:b", "lowerdir+=/c")},
			&plan{tree: &tree{lowers: []string{"/a:b", "/c"}}, readOnly: true}},
		{"overlayfs, first layer", []*types.Mount{m("bind", s+"1/fs", "rw", "rbind")}, &plan{tree: &tree{upper: s + "1/fs"}}},
		{"overlayfs, view of one layer", []*types.Mount{m("bind", s+"1/fs", "ro", "rbind")},
			&plan{tree: &tree{lowers: []string{s + "1/fs"}}, readOnly: true}},
		{"erofs, active", []*types.Mount{erofs(3), erofs(2), erofs(1), m("format/mkdir/overlay", "overlay",
			"workdir="+s+"9/work", "upperdir="+s+"9/fs", "lowerdir={{ overlay 0 2 }}")},
			&plan{images: images(3, 2, 1), tree: &tree{upper: s + "9/fs"}}},
		{"erofs, active, block device", []*types.Mount{
			m("mkfs/ext4", s+"9/rwlayer.img", "X-containerd.mkfs.fs=ext4", "X-containerd.mkfs.size=1048576", "rw", "loop"), erofs(2), erofs(1),
			m("format/mkdir/overlay", "overlay", "X-containerd.mkdir.path={{ mount 0 }}/upper:0755",
				"X-containerd.mkdir.path={{ mount 0 }}/work:0755",
				"workdir={{ mount 0 }}/work", "upperdir={{ mount 0 }}/upper", "lowerdir={{ overlay 1 2 }}")},
			&plan{images: images(2, 1), writableBytes: 1 << 20}},
		{"erofs, one layer", []*types.Mount{erofs(1), m("format/mkdir/overlay", "overlay", "workdir=/w", "upperdir=/u",
			"lowerdir={{ mount 0 }}")},
			&plan{images: images(1), tree: &tree{upper: "/u"}}},
		{"erofs, upside down", []*types.Mount{erofs(1), erofs(2), m("format/mkdir/overlay", "overlay", "lowerdir={{overlay 1 0}}")},
			&plan{images: images(2, 1), readOnly: true}},
		{"erofs, view", []*types.Mount{erofs(2), erofs(1), m("format/mkdir/overlay", "overlay", "lowerdir={{ overlay 0 1 }}")},
			&plan{images: images(2, 1), readOnly: true}},
		{"erofs, view of one layer", []*types.Mount{erofs(1)}, &plan{images: images(1), readOnly: true}},
		{"erofs, merged metadata", []*types.Mount{m("erofs", s+"3/fsmeta.erofs", "ro", "loop", "device="+layer(1), "device="+layer(2)),
			m("format/bind", "{{ mount 0 }}", "ro", "rbind")},
			&plan{images: []image{{s + "3/fsmeta.erofs", []string{layer(1), layer(2)}}}, readOnly: true}},
		{"overlayfs, mapped", []*types.Mount{m("overlay", "overlay", "uidmap=0:1000:10,10:5000:1", "gidmap=0:2000:10", "workdir=/w",
			"upperdir=/u", "lowerdir=/l")}, &plan{tree: &tree{lowers: []string{"/l"}, upper: "/u"},
			ids: idmap.Map{UIDs: "0:1000:10,10:5000:1", GIDs: "0:2000:10"}}},
		{"overlayfs, mapped view of one layer", []*types.Mount{m("bind", "/l", "ro", "rbind", "uidmap=0:1:1", "gidmap=0:2:2")},
			&plan{tree: &tree{lowers: []string{"/l"}}, readOnly: true, ids: idmap.Map{UIDs: "0:1:1", GIDs: "0:2:2"}}},
		{"erofs, mapped", []*types.Mount{erofs(1), m("format/mkdir/overlay", "overlay", "workdir=/w", "upperdir=/u", "uidmap=0:1:1",
			"gidmap=0:2:2", "lowerdir={{ mount 0 }}")},
			&plan{images: images(1), tree: &tree{upper: "/u"}, ids: idmap.Map{UIDs: "0:1:1", GIDs: "0:2:2"}}},
		{"erofs, no layers, block device", []*types.Mount{m("mkfs/ext4", "/rw.img", "X-containerd.mkfs.size=1GiB", "rw", "loop"),
			m("format/mkdir/bind", "{{ mount 0 }}/upper", "X-containerd.mkdir.path={{ mount 0 }}/upper:0755", "rw", "rbind")},
			&plan{empty: true, writableBytes: 1 << 30}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got, err := parseMounts(tc.mounts)
			require.NoError(t, err)
			require.Equal(t, tc.want, got)
		})
	}
}

func TestParseMountsRefuses(t *testing.T) {
	overlay := func(options ...string) []*types.Mount { return []*types.Mount{m("overlay", "overlay", options...)} }
	erofs := m("erofs", "/layer.erofs", "ro", "loop")
	many := make([]*types.Mount, maxMounts+1)
	for _, tc := range []struct {
		name     string
		mounts   []*types.Mount
		notThere bool // ErrNotImplemented, else ErrInvalidArgument
		says     string
	}{
		{"nothing", nil, false, "no mounts"},
		{"too many", many, false, "more than"},
		{"nil", []*types.Mount{nil}, false, "empty"},
		{"unknown type", []*types.Mount{m("zfs", "pool/a")}, true, "overlayfs or the erofs"},
		{"ext4 image", []*types.Mount{m("ext4", "/dev/sdz")}, true, "writable image"},
		{"unknown transform", []*types.Mount{m("magic/overlay", "overlay")}, true, `"magic"`},
		{"target", []*types.Mount{{Type: "bind", Source: "/a", Target: "/b"}}, true, "target"},
		{"unknown option", overlay("lowerdir=/a", "datadir+=/x"), true, `"datadir+=/x"`},
		{"mapped users only", overlay("lowerdir=/a", "uidmap=0:1000:1"), false, "gidmap"},
		{"empty map", []*types.Mount{m("bind", "/a", "uidmap=", "gidmap=0:1:1")}, false, "uidmap"},
		{"mapped ids of an image", []*types.Mount{m("erofs", "/l.erofs", "uidmap=0:1:1", "gidmap=0:1:1")}, true, "uidmap"},
		{"mapped ids below", []*types.Mount{m("bind", "/a", "ro", "uidmap=0:1:1", "gidmap=0:1:1"), m("overlay", "overlay", "lowerdir=/b")}, true,
			"only the last"},
		{"noexec", overlay("lowerdir=/a", "noexec"), true, "noexec"},
		{"data-only layers", overlay("lowerdir=/a::/b"), true, "data-only"},
		{"no layers", overlay("upperdir=/u", "workdir=/w"), false, "without lowerdir"},
		{"relative", overlay("lowerdir=a"), false, "absolute"},
		{"not clean", overlay("lowerdir=/a/../b"), false, "clean"},
		{"too many layers", overlay("lowerdir=/" + strings.Repeat("a:/", MaxLayers) + "a"), false, "layers are more"},
		{"long", overlay("lowerdir=/" + strings.Repeat("a", maxOptionLen)), false, "too long"},
		{"bind option", []*types.Mount{m("bind", "/a", "volatile")}, true, "volatile"},
		{"relative bind", []*types.Mount{m("bind", "a")}, false, "absolute"},
		{"dm-verity", []*types.Mount{m("erofs", "/l.erofs", "ro", "loop", "X-containerd.dmverity=/l.erofs.dmverity")}, true, "dmverity_mode"},
		{"unused layer", []*types.Mount{erofs, erofs, m("format/overlay", "overlay", "lowerdir={{ mount 0 }}")}, false, "mount 1"},
		{"layer used twice", []*types.Mount{erofs, m("format/overlay", "overlay", "lowerdir={{ mount 0 }}:{{ mount 0 }}")}, false, "used once"},
		{"mixed", []*types.Mount{erofs, m("format/overlay", "overlay", "lowerdir={{ mount 0 }}:/a")}, true, "mixes"},
		{"index too large", []*types.Mount{erofs, m("format/overlay", "overlay", "lowerdir={{ overlay 0 1 }}")}, false, "number of one"},
		{"part of a layer", []*types.Mount{erofs, m("format/overlay", "overlay", "lowerdir={{ mount 0 }}/a")}, false, "whole image"},
		{"upper on a layer", []*types.Mount{erofs, m("format/overlay", "overlay", "lowerdir={{ mount 0 }}", "upperdir={{ mount 0 }}/u")}, false,
			"writable"},
		{"redirects in images", []*types.Mount{erofs, m("format/overlay", "overlay", "lowerdir={{ mount 0 }}", "redirect_dir=on")}, true,
			"ovl_mount_options"},
		{"erofs with a transform", []*types.Mount{m("format/erofs", "/a")}, true, "format/erofs"},
		{"size", []*types.Mount{m("mkfs/ext4", "/rw", "X-containerd.mkfs.size=9999999TiB"), m("format/bind", "{{ mount 0 }}")}, false,
			"too large"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, err := parseMounts(tc.mounts)
			kind := error(errdefs.ErrInvalidArgument)
			if tc.notThere {
				kind = errdefs.ErrNotImplemented
			}
			require.ErrorIs(t, err, kind)
			require.ErrorContains(t, err, tc.says)
		})
	}
}

func TestParseSize(t *testing.T) {
	for in, want := range map[string]int64{"0": 0, "1048576": 1 << 20, "20GiB": 20 << 30, "512m": 512 << 20, "3 MB": 3 << 20, "7b": 7,
		"1K": 1024} {
		got, err := parseSize(in)
		require.NoError(t, err, in)
		require.Equal(t, want, got, in)
	}
	for _, in := range []string{"", "x", "-1", "1.5G", "1GG", "99999999999999999999", "9000000P"} {
		_, err := parseSize(in)
		require.ErrorIs(t, err, errdefs.ErrInvalidArgument, in)
	}
}

func FuzzParseMounts(f *testing.F) {
	f.Add("overlay", "overlay", "lowerdir=/a:/b\nindex=off")
	f.Add("format/mkdir/overlay", "overlay", "lowerdir={{ overlay 0 1 }}\nupperdir={{ mount 2 }}/upper")
	f.Add("format/bind", "{{ mount 0 }}/x", "ro\nrbind")
	f.Add("bind", "/a", "rw\nrbind")
	f.Add("mkfs/ext4", "/rw", "X-containerd.mkfs.size=1GiB")
	f.Fuzz(func(t *testing.T, mountType, source, options string) {
		last := m(mountType, source, strings.Split(options, "\n")...)
		p, err := parseMounts([]*types.Mount{m("erofs", "/0", "ro"), m("erofs", "/1", "device=/d"), m("mkfs/ext4", "/2"), last})
		if err != nil {
			return
		}
		if len(p.images) == 0 && p.tree == nil && !p.empty {
			t.Fatal("accepted mounts that name no layer")
		}
		// The two images before the last mount are used, or the mounts are refused.
		if len(p.images) != 2 {
			t.Fatalf("%d images", len(p.images))
		}
	})
}

func FuzzParseTemplate(f *testing.F) {
	for _, s := range []string{"{{ mount 0 }}", "{{overlay 2 0}}", "{{ mount 1 }}/a/b", "{{", "{{}}", "{{ mount 0 }}{{ mount 1 }}"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		ref, err := parseTemplate(s, 3)
		if err != nil {
			return
		}
		if len(ref.mounts) == 0 || len(ref.mounts) > 3 {
			t.Fatalf("%d mounts", len(ref.mounts))
		}
		for _, n := range ref.mounts {
			if n < 0 || n > 2 {
				t.Fatalf("mount %d", n)
			}
		}
	})
}
