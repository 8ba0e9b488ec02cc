// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/cloister-project/cloister/tee/initdata"
	"github.com/cloister-project/cloister/test/harness"
)

const testInitdata = `version = "0.1.0"
algorithm = "sha384"

[data]
"policy.toml" = "of the test"
`

// kataInitdata is the widely used annotation with a pod's own initdata.
const kataInitdata = "io.katacontainers.config.hypervisor.cc_init_data"

// withSampleSettings lays text over the sample handler's configuration until the test's end.
func withSampleSettings(t *testing.T, n *harness.Node, text string) {
	t.Helper()
	require.NoError(t, n.WriteHandlerDropIn(harness.HandlerSample, "60-test", text))
	t.Cleanup(func() { assert.NoError(t, n.RemoveHandlerDropIn(harness.HandlerSample, "60-test")) })
}

// TestConfidentialInitdata: the guest runs with the document that its launch binds, and with no other.
func TestConfidentialInitdata(t *testing.T) {
	n := sharedNode(t)
	path := filepath.Join(t.TempDir(), "initdata.toml")
	require.NoError(t, os.WriteFile(path, []byte(testInitdata), 0o600))
	setting := fmt.Sprintf("[tee]\ninitdata = %q\n", path)

	t.Run("right", func(t *testing.T) {
		withSampleSettings(t, n, setting)
		doc, err := initdata.Parse([]byte(testInitdata))
		require.NoError(t, err)
		pod := runPod(t, n, harness.PodSpec{Handler: harness.HandlerSample})
		_, info, err := pod.Status(testContext(t))
		require.NoError(t, err)
		assert.Contains(t, info["initdata"], "sha384:"+hex.EncodeToString(doc.Digest()))
		c := runContainer(t, pod, harness.ContainerSpec{})
		assert.Contains(t, output(t, c, "cat /proc/cmdline"), "cloister.initdata="+hex.EncodeToString(initdata.Bind(doc.Digest(), 64)))
		require.NoError(t, pod.Stop(testContext(t)))
	})
	t.Run("the pod's own", func(t *testing.T) {
		withSampleSettings(t, n, setting+fmt.Sprintf("[annotations]\nallowed = [%q]\n", kataInitdata))
		own := []byte("version = \"0.1.0\"\nalgorithm = \"sha256\"\n[data]\nmine = \"yes\"\n")
		doc, err := initdata.Parse(own)
		require.NoError(t, err)
		value, err := initdata.EncodeAnnotation(own)
		require.NoError(t, err)
		pod := runPod(t, n, harness.PodSpec{Handler: harness.HandlerSample, Annotations: map[string]string{kataInitdata: value}})
		_, info, err := pod.Status(testContext(t))
		require.NoError(t, err)
		assert.Contains(t, info["initdata"], "sha256:"+hex.EncodeToString(doc.Digest()))
		require.NoError(t, pod.Stop(testContext(t)))

		_, err = n.CRI().RunPod(testContext(t), harness.PodSpec{Handler: harness.HandlerSample,
			Annotations: map[string]string{kataInitdata: "!"}})
		require.ErrorContains(t, err, "initdata")
	})
	t.Run("not valid", func(t *testing.T) {
		bad := filepath.Join(t.TempDir(), "bad.toml")
		require.NoError(t, os.WriteFile(bad, []byte("version = \"0.1.0\"\nalgorithm = \"md5\"\n[data]\n"), 0o600))
		withSampleSettings(t, n, fmt.Sprintf("[tee]\ninitdata = %q\n", bad))
		requireNoPod(t, n, harness.PodSpec{Handler: harness.HandlerSample}, "initdata", "md5")
	})

	// A hostile host: between Cloister and QEMU stands a program that puts another disk in initdata's place.
	other := bytes.Replace([]byte(testInitdata), []byte("of the test"), []byte("of the host"), 1)
	var otherDisk bytes.Buffer
	require.NoError(t, initdata.WriteDisk(&otherDisk, other))
	for _, c := range []struct {
		name string
		disk []byte
		want []string
	}{
		{"another document", otherDisk.Bytes(), []string{"the guest refuses", "initdata"}},
		{"no document", make([]byte, 4096), []string{"the guest refuses", "initdata"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			withSampleSettings(t, n, setting+fmt.Sprintf("[hypervisor]\npath = %q\n", diskSwapper(t, n, c.disk)))
			requireNoPod(t, n, harness.PodSpec{Handler: harness.HandlerSample}, c.want...)
		})
	}
}

// diskSwapper is a program in QEMU's place that overwrites the image of initdata's disk and becomes QEMU.
func diskSwapper(t *testing.T, n *harness.Node, disk []byte) string {
	t.Helper()
	dir := t.TempDir()
	image := filepath.Join(dir, "disk")
	require.NoError(t, os.WriteFile(image, disk, 0o600))
	script := fmt.Sprintf(`#!/bin/sh
for f in $(echo "$*" | grep -o '/[^ ,"]*/initdata\.img' | sort -u); do cat %q > "$f" || exit 9; done
exec %q "$@"
`, image, n.Artifacts().QEMU)
	path := filepath.Join(dir, "qemu-of-a-hostile-host")
	require.NoError(t, os.WriteFile(path, []byte(script), 0o755))
	return path
}
