// SPDX-License-Identifier: Apache-2.0

package volumes

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

func TestSubPathOf(t *testing.T) {
	root := t.TempDir()
	pod := filepath.Join(root, "pods", "0a1b2c3d-0000-4000-8000-00000000000a")
	for _, dir := range []string{"volumes/kubernetes.io~configmap/cm", "volumes/kubernetes.io~secret/s", "volumes/kubernetes.io~csi/data",
		"volumes/kubernetes.io~empty-dir/e"} {
		require.NoError(t, os.MkdirAll(filepath.Join(pod, dir), 0o755))
	}
	part := func(volume string) string { return filepath.Join(pod, "volume-subpaths", volume, "main", "0") }
	line := func(id int, dev, root, point string) string {
		return fmt.Sprintf("%d 1 %s %s %s rw,relatime - ext4 /dev/vda1 rw\n", id, dev, strings.ReplaceAll(root, " ", `\040`), point)
	}
	base := line(1, "8:1", "/", "/") + line(2, "8:2", "/disk", root) + line(3, "0:77", "/", pod+"/volumes/kubernetes.io~secret/s")
	inDisk := func(path string) string { return "/disk" + strings.TrimPrefix(filepath.Join(pod, path), root) }
	for _, tc := range []struct {
		name, volume, mount string
		kind                Kind
		rest                string
	}{
		{"file of a ConfigMap on the node's disk", "cm", line(9, "8:2", inDisk("volumes/kubernetes.io~configmap/cm/..2026/key"), part("cm")),
			Copied, "..2026/key"},
		{"one that was replaced since", "cm", line(9, "8:2", inDisk("volumes/kubernetes.io~configmap/cm/..2025/key")+"//deleted", part("cm")),
			Copied, "..2025/key"},
		{"the volume itself", "cm", line(9, "8:2", inDisk("volumes/kubernetes.io~configmap/cm"), part("cm")), Copied, ""},
		{"file of a Secret in memory", "s", line(9, "0:77", "/..2026/key", part("s")), Copied, "..2026/key"},
		{"emptyDir", "e", line(9, "8:2", inDisk("volumes/kubernetes.io~empty-dir/e/sub"), part("e")), Scratch, "sub"},
		{"persistent volume", "data", line(9, "8:2", inDisk("volumes/kubernetes.io~csi/data/x"), part("data")), Foreign, "x"},
		{"mounted twice, the last one counts", "cm", line(8, "8:1", "/etc", part("cm")) +
			line(9, "8:2", inDisk("volumes/kubernetes.io~configmap/cm/k"), part("cm")), Copied, "k"},
		{"same place on another disk", "cm", line(9, "8:1", inDisk("volumes/kubernetes.io~configmap/cm/k"), part("cm")), Other, ""},
		{"another volume's", "cm", line(9, "0:77", "/key", part("cm")), Other, ""},
		{"beside the volume", "cm", line(9, "8:2", inDisk("volumes/kubernetes.io~configmap/cm-other/key"), part("cm")), Other, ""},
		{"a directory of the host", "cm", line(9, "8:2", "/disk/etc", part("cm")), Other, ""},
		{"no mount", "cm", "", Other, ""},
		{"no such volume", "none", line(9, "8:2", inDisk("volumes/kubernetes.io~configmap/none/k"), part("none")), Other, ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got, err := subPathOf(strings.NewReader(base+tc.mount), Parse(part(tc.volume)), part(tc.volume))
			if tc.kind == Other {
				require.ErrorIs(t, err, errdefs.ErrNotFound)
				return
			}
			require.NoError(t, err)
			require.Equal(t, tc.kind, got.Kind)
			require.Equal(t, tc.rest, got.Rest)
		})
	}
}

// The same with mounts that the kubelet would make.
func TestSubPathOfARealMount(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("mounting needs root")
	}
	pod := filepath.Join(t.TempDir(), "pods", "0a1b2c3d-0000-4000-8000-00000000000a")
	secret, part := filepath.Join(pod, "volumes/kubernetes.io~secret/s"), filepath.Join(pod, "volume-subpaths/s/main/0")
	for _, dir := range []string{secret, filepath.Dir(part)} {
		require.NoError(t, os.MkdirAll(dir, 0o755))
	}
	require.NoError(t, os.WriteFile(part, nil, 0o600))
	require.NoError(t, unix.Mount("none", secret, "tmpfs", 0, "size=64k"))
	t.Cleanup(func() { _ = unix.Unmount(secret, unix.MNT_DETACH) })
	require.NoError(t, os.WriteFile(filepath.Join(secret, "key"), []byte("x"), 0o600))
	require.NoError(t, unix.Mount(filepath.Join(secret, "key"), part, "", unix.MS_BIND, ""))
	t.Cleanup(func() { _ = unix.Unmount(part, unix.MNT_DETACH) })
	got, err := SubPathOf(Parse(part), part)
	require.NoError(t, err)
	require.Equal(t, Path{Kind: Copied, Pod: pod, Plugin: "kubernetes.io~secret", Volume: "s", Rest: "key"}, got)
	require.NoError(t, os.Remove(filepath.Join(secret, "key")))
	got, err = SubPathOf(Parse(part), part)
	require.NoError(t, err, "removed since")
	require.Equal(t, Copied, got.Kind)
}
