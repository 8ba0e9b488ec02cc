// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"crypto/ecdh"
	"crypto/rand"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/cloister-project/cloister/agent-protocol/wire"
	"github.com/cloister-project/cloister/hypervisor"
	"github.com/cloister-project/cloister/hypervisor/qemu"
	"github.com/cloister-project/cloister/hypervisor/vmm"
	"github.com/cloister-project/cloister/tee"
	"github.com/cloister-project/cloister/tee/se/hostkey"
	"github.com/cloister-project/cloister/tee/se/image"
	"github.com/cloister-project/cloister/test/harness"
)

const sealedInitdata = `version = "0.1.0"
algorithm = "sha384"

[data]
"note" = "sealed into the image"
`

// TestSecureExecution takes a Secure Execution image from its building to a container in its guest, with a software
// ultravisor: what the hardware does with the image, unpacking it with the host's private key and checking it on the way,
// package tee/se/image does here, with a key made for the test, and an emulated machine starts what comes out. Nothing is
// protected by that. The sealed command line therefore names the sample platform: the agent refuses to run as Secure
// Execution where there is no ultravisor, which the last part shows. The lane for the hardware is TestSE.
func TestSecureExecution(t *testing.T) {
	n := s390xNode(t)
	host, err := hostkey.NewKey(rand.Reader)
	require.NoError(t, err)

	sealed := buildSealed(t, n, host, tee.Sample, []byte(sealedInitdata))
	assert.False(t, bytes.Contains(sealed.Bytes(), []byte(wire.ParamTEE)), "the command line is encrypted")
	flat := openSealed(t, n, host, sealed)
	document := filepath.Join(t.TempDir(), "initdata.toml")
	require.NoError(t, os.WriteFile(document, []byte(sealedInitdata), 0o600))

	t.Run("pod", func(t *testing.T) {
		useSealed(t, n, flat, document)
		pod := runPod(t, n, harness.PodSpec{Handler: harness.HandlerSealed})
		_, info, err := pod.Status(testContext(t))
		require.NoError(t, err)
		assert.Contains(t, fmt.Sprint(info), "NO PROTECTION")
		checkForeignContainer(t, pod, s390xImage)
		c := runContainer(t, pod, harness.ContainerSpec{Name: "sealed", Image: s390xImage})
		assert.Equal(t, sealed.Parameters(), output(t, c, "cat /proc/cmdline"), "the host adds nothing")
		checkEncryptedDisk(t, n, pod, "s390x")
	})
	t.Run("other initdata", func(t *testing.T) {
		other := filepath.Join(t.TempDir(), "initdata.toml")
		require.NoError(t, os.WriteFile(other, []byte(strings.Replace(sealedInitdata, "sealed into", "not in", 1)), 0o600))
		useSealed(t, n, flat, other)
		refused(t, n, "initdata")
	})
	t.Run("initdata that the image knows nothing of", func(t *testing.T) {
		without := buildSealed(t, n, host, tee.Sample, nil)
		useSealed(t, n, openSealed(t, n, host, without), document)
		refused(t, n, "initdata")
	})
	t.Run("no ultravisor", func(t *testing.T) {
		useSealed(t, n, openSealed(t, n, host, buildSealed(t, n, host, tee.SE, nil)), "")
		refused(t, n, "platform se")
	})
}

// buildSealed makes an image of the guest that `make guest-s390x` built, for one host key.
func buildSealed(t *testing.T, n *harness.Node, host *ecdh.PrivateKey, platform tee.Name, initdata []byte) *image.Image {
	t.Helper()
	stubs, err := harness.SetupValue("CLOISTER_SE_STUBS")
	require.NoError(t, err)
	a := n.Artifacts()
	sources, err := image.ReadSources(a.KernelS390X, a.InitrdS390X, stubs)
	require.NoError(t, err)
	driver, err := vmm.New(vmm.Config{Kind: qemu.Kind, Arch: hypervisor.ArchS390X})
	require.NoError(t, err)
	parameters := append(driver.KernelParameters(hypervisor.AccelTCG),
		"cgroup_no_v1=all", "random.trust_cpu=on", "swiotlb=32768,force")
	sealed, err := image.Build(testContext(t), image.BuildConfig{
		Sources: sources, Parameters: strings.Join(parameters, " "), Initdata: initdata,
		HostKeys: []*ecdh.PublicKey{host.PublicKey()}, Platform: platform,
	})
	require.NoError(t, err)
	return sealed
}

// openSealed is the software ultravisor: it opens and checks the image, compares what was in it with what went in, and
// writes the guest's memory as it is when the guest starts.
func openSealed(t *testing.T, n *harness.Node, host *ecdh.PrivateKey, sealed *image.Image) (flat string) {
	t.Helper()
	opened, err := image.Open(bytes.NewReader(sealed.Bytes()), int64(len(sealed.Bytes())), host)
	require.NoError(t, err)
	assert.Equal(t, sealed.Parameters(), opened.Parameters)
	for path, got := range map[string][]byte{n.Artifacts().KernelS390X: opened.Kernel, n.Artifacts().InitrdS390X: opened.Initrd} {
		want, err := os.ReadFile(path)
		require.NoError(t, err)
		assert.True(t, bytes.Equal(want, got), path)
	}
	flat = filepath.Join(t.TempDir(), "flat.img")
	f, err := os.Create(flat)
	require.NoError(t, err)
	defer f.Close()
	require.NoError(t, opened.WriteFlat(f))
	require.NoError(t, f.Close())
	return flat
}

// useSealed makes the pods of HandlerSealed start from the image until the test ends.
func useSealed(t *testing.T, n *harness.Node, flat, initdata string) {
	t.Helper()
	text := fmt.Sprintf("[tee]\ninitdata = %q\n\n[tee.se]\nimage = %q\n", initdata, flat)
	require.NoError(t, n.WriteHandlerDropIn(harness.HandlerSealed, "50-image", text))
	t.Cleanup(func() { assert.NoError(t, n.RemoveHandlerDropIn(harness.HandlerSealed, "50-image")) })
}

// refused has a pod whose guest must refuse to run, and whose error says why.
func refused(t *testing.T, n *harness.Node, reason string) {
	t.Helper()
	pod, err := n.CRI().RunPod(testContext(t), harness.PodSpec{Handler: harness.HandlerSealed})
	if pod != nil {
		cleanup(t, "removing the pod", pod.Remove)
	}
	require.ErrorContains(t, err, "the guest refuses to run")
	assert.ErrorContains(t, err, reason)
}
