// SPDX-License-Identifier: Apache-2.0

package volumes

import (
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

const testPod = "/var/lib/kubelet/pods/0a1b2c3d-0000-4000-8000-00000000000a"

func TestParse(t *testing.T) {
	for path, want := range map[string]Path{
		testPod + "/volumes/kubernetes.io~configmap/cm": {Kind: Copied, Pod: testPod, Plugin: "kubernetes.io~configmap",
			Volume: "cm"},
		testPod + "/volumes/kubernetes.io~secret/s/": {Kind: Copied, Pod: testPod, Plugin: "kubernetes.io~secret",
			Volume: "s"},
		testPod + "/volumes/kubernetes.io~projected/kube-api": {Kind: Copied, Pod: testPod, Plugin: "kubernetes.io~projected",
			Volume: "kube-api"},
		testPod + "/volumes/kubernetes.io~downward-api/d/a/b": {Kind: Copied, Pod: testPod, Plugin: "kubernetes.io~downward-api",
			Volume: "d", Rest: "a/b"},
		testPod + "/volumes/kubernetes.io~secret/s/..2026_01/a/b": {Kind: Copied, Pod: testPod, Plugin: "kubernetes.io~secret",
			Volume: "s", Rest: "a/b"},
		testPod + "/volumes/kubernetes.io~secret/s/..data": {Kind: Copied, Pod: testPod, Plugin: "kubernetes.io~secret",
			Volume: "s"},
		testPod + "/volumes/kubernetes.io~empty-dir/e": {Kind: Scratch, Pod: testPod, Plugin: "kubernetes.io~empty-dir",
			Volume: "e"},
		testPod + "/volumes/kubernetes.io~empty-dir/e/sub": {Kind: Scratch, Pod: testPod, Plugin: "kubernetes.io~empty-dir",
			Volume: "e", Rest: "sub"},
		testPod + "/volumes/kubernetes.io~csi/pvc-1/mount": {Kind: Foreign, Pod: testPod, Plugin: "kubernetes.io~csi",
			Volume: "pvc-1", Rest: "mount"},
		testPod + "/volumes/kubernetes.io~local-volume/pv": {Kind: Foreign, Pod: testPod,
			Plugin: "kubernetes.io~local-volume", Volume: "pv"},
		testPod + "/volume-subpaths/cm/main/0":                                 {Kind: SubPath, Pod: testPod, Volume: "cm"},
		testPod + "/containers/main/1a2b3c4d":                                  {Kind: TerminationLog, Pod: testPod},
		"/var/lib/containerd/io.containerd.grpc.v1.cri/containers/c/volumes/v": {Kind: ImageVolume},
		// A pod's directory in another root, one that itself lies in a directory called pods.
		"/srv/pods/node-0001/kubelet/pods/static-00000000/volumes/kubernetes.io~secret/s": {
			Kind: Copied, Pod: "/srv/pods/node-0001/kubelet/pods/static-00000000", Plugin: "kubernetes.io~secret", Volume: "s"},

		"/etc":                 {},
		"/":                    {},
		"relative":             {},
		testPod:                {},
		testPod + "/etc-hosts": {},
		testPod + "/volumes":   {},
		testPod + "/volumes/kubernetes.io~secret":                 {},
		testPod + "/volumes/secret/s":                             {},
		testPod + "/volume-subpaths/cm/main":                      {},
		testPod + "/volume-subpaths/cm/main/0/x":                  {},
		testPod + "/containers/main":                              {},
		testPod + "/plugins/kubernetes.io~secret/s":               {},
		"/srv/pods/short/volumes/kubernetes.io~secret/s":          {},
		"/srv/volumes/kubernetes.io~secret/s":                     {},
		testPod + "/volumes/kubernetes.io~secret/../../../../etc": {},
		"/srv/containers/c/volumes/v":                             {},
	} {
		t.Run(strings.ReplaceAll(path, "/", "_"), func(t *testing.T) { require.Equal(t, want, Parse(path)) })
	}
	require.Equal(t, testPod+"/volumes/kubernetes.io~secret/s", Parse(testPod+"/volumes/kubernetes.io~secret/s/a").Dir())
}

func FuzzParse(f *testing.F) {
	f.Add(testPod + "/volumes/kubernetes.io~secret/s/../x")
	f.Add(testPod + "/volume-subpaths/cm/main/0")
	f.Add("/pods/pods/pods/volumes")
	f.Fuzz(func(t *testing.T, path string) {
		p := Parse(path)
		for _, s := range []string{p.Pod, p.Volume, p.Plugin, p.Rest} {
			require.NotContains(t, strings.Split(s, "/"), "..")
		}
		if p.Kind == Copied || p.Kind == Scratch {
			require.NotEmpty(t, p.Volume)
			require.Equal(t, p, Parse(p.Dir()+strings.TrimSuffix("/"+p.Rest, "/")), "taking apart and putting together")
		}
	})
}

// What a manifest calls a volume leads to the kind that its path has.
func TestPluginsOfManifests(t *testing.T) {
	for source, want := range map[string]Kind{
		"configMap": Copied, "secret": Copied, "projected": Copied, "downwardAPI": Copied, "emptyDir": Scratch,
		"persistentVolumeClaim": Foreign, "csi": Foreign, "": Foreign, "../../x": Foreign, "EmptyDir": Foreign,
	} {
		dir := Path{Pod: "/var/lib/kubelet/pods/00000000-0000-0000-0000-000000000000", Plugin: Plugin(source), Volume: "v"}.Dir()
		got := Parse(dir)
		require.Equal(t, want, got.Kind, "%q: %s", source, dir)
		require.Equal(t, "v", got.Volume)
		require.Equal(t, dir, got.Dir())
	}
}
