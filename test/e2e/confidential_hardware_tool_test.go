// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"crypto/ecdh"
	"crypto/rand"
	"encoding/base64"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"github.com/u-root/u-root/pkg/cpio"

	"github.com/cloister-project/cloister/tee/se/attest"
	"github.com/cloister-project/cloister/tee/se/hostkey"
	"github.com/cloister-project/cloister/test/harness"
)

// evidenceTool is testdata/evidence in its image.
const evidenceTool = "/bin/evidence"

// hostArch is this machine's architecture as Go names it: the tests run where they were built for.
func hostArch() string { return runtime.GOARCH }

// evidenceImage is toolImage for testdata/evidence.
func evidenceImage(t *testing.T, n *harness.Node, arch string) (name string) {
	t.Helper()
	return toolImage(t, n, arch, filepath.Base(evidenceTool))
}

// toolImage makes the node have an image with busybox and a program of testdata for an architecture, as /bin/TOOL.
func toolImage(t *testing.T, n *harness.Node, arch, tool string) (name string) {
	t.Helper()
	program := filepath.Join(t.TempDir(), tool)
	build := exec.CommandContext(testContext(t), "go", "build", "-trimpath", "-buildvcs=false", "-ldflags", "-s -w", "-o", program,
		"./testdata/"+tool)
	build.Env = append(os.Environ(), "CGO_ENABLED=0", "GOARCH="+arch)
	out, err := build.CombinedOutput()
	require.NoError(t, err, string(out))
	binary, err := os.ReadFile(program)
	require.NoError(t, err)

	name = "localhost/cloister/" + tool + ":" + arch
	a := n.Artifacts()
	busybox, native := a.Busybox, a.Busybox
	if arch != hostArch() {
		require.Equal(t, "s390x", arch)
		busybox = a.BusyboxS390X
	}
	im, err := harness.BusyboxS390X(name, busybox, native)
	require.NoError(t, err)
	im.Layers = append(im.Layers, []harness.File{{Name: "bin/" + tool, Body: binary, Mode: 0o755}})
	require.NoError(t, n.Import(testContext(t), im))
	return name
}

// toolFails runs the tool in a container, which must fail with all the words.
func toolFails(t *testing.T, c *harness.Container, args []string, want ...string) {
	t.Helper()
	result, err := c.Exec(testContext(t), append([]string{evidenceTool}, args...)...)
	require.NoError(t, err)
	t.Logf("evidence %s: status %d: %s", args[0], result.ExitCode, strings.TrimSpace(result.Stderr))
	assert.EqualValues(t, 1, result.ExitCode)
	assert.Empty(t, result.Stdout)
	requireContains(t, result.Stderr, want...)
	// It leaves nothing behind, whatever it got to.
	assert.Empty(t, output(t, c, "ls /tmp; ls /dev | grep evidence || true; grep configfs /proc/self/mountinfo || true"))
}

// checkDeviceRules opens a device that containers do not have, the way that the tool opens /dev/uv. The log of the
// kernel is one on every architecture. A container that is not privileged gets nowhere.
func checkDeviceRules(t *testing.T, pod *harness.Pod, image string) {
	const directory = "/sys/class/mem/kmsg"
	c := runContainer(t, pod, harness.ContainerSpec{Image: image, Change: privilegedContainer})
	for _, want := range []string{"the container's device rules refused it; opened without them", "opened at once"} {
		got, err := c.Output(testContext(t), evidenceTool, "open", directory)
		require.NoError(t, err)
		assert.Equal(t, want, got)
	}
	plain := runContainer(t, pod, harness.ContainerSpec{Image: image})
	toolFails(t, plain, []string{"open", directory}, "take the device rules off the container", "operation not permitted")
}

// withReportModules is the node's initrd with the modules of reports loaded in every guest, without the drivers that need
// the hardware.
func withReportModules(t *testing.T, n *harness.Node) (path string) {
	t.Helper()
	image, err := os.ReadFile(n.Artifacts().Initrd)
	require.NoError(t, err)
	list := ""
	require.NoError(t, cpio.ForEachRecord(cpio.Newc.Reader(bytes.NewReader(image)), func(r cpio.Record) error {
		if r.Name == "lib/modules/load" {
			text := make([]byte, r.FileSize)
			_, err := r.ReadAt(text, 0)
			list = string(text)
			return err
		}
		return nil
	}))
	for _, module := range []string{"configfs.ko", "tsm.ko"} {
		require.Contains(t, list, "snp "+module+"\n")
		list = strings.Replace(list, "snp "+module, "later "+module, 1)
	}
	// A later file takes the place of an earlier one.
	over := bytes.NewBuffer(image)
	for over.Len()%4 != 0 {
		over.WriteByte(0)
	}
	w := cpio.Newc.Writer(over)
	require.NoError(t, w.WriteRecord(cpio.StaticRecord([]byte(list),
		cpio.Info{Ino: 1, NLink: 1, Name: "lib/modules/load", Mode: cpio.S_IFREG | 0o444})))
	require.NoError(t, cpio.WriteTrailer(w))
	path = filepath.Join(t.TempDir(), "initrd.img")
	require.NoError(t, os.WriteFile(path, over.Bytes(), 0o600))
	return path
}

// TestReportToolWithoutHardware takes what TestSNP and TestTDX do in a guest as far as a guest without the hardware lets
// it: to the driver that would ask the hardware.
func TestReportToolWithoutHardware(t *testing.T) {
	n := sharedNode(t)
	image := evidenceImage(t, n, hostArch())
	tsm := []string{"tsm", base64.StdEncoding.EncodeToString(randomBytes(64))}
	t.Run("guest without the modules", func(t *testing.T) {
		pod := runPod(t, n, harness.PodSpec{Handler: harness.HandlerSample, Change: privilegedPod})
		c := runContainer(t, pod, harness.ContainerSpec{Image: image, Change: privilegedContainer})
		toolFails(t, c, tsm, "no configfs: ", "no such device")
		toolFails(t, c, []string{"tsm", "AAAA"}, "a nonce of 3 bytes")
		t.Run("device rules", func(t *testing.T) { checkDeviceRules(t, pod, image) })
	})
	t.Run("guest with the modules", func(t *testing.T) {
		overlay(t, n, harness.HandlerSample, "60-test", "[hypervisor]\ninitrd = '"+withReportModules(t, n)+"'\n")
		pod := runPod(t, n, harness.PodSpec{Handler: harness.HandlerSample, Change: privilegedPod})
		c := runContainer(t, pod, harness.ContainerSpec{Image: image, Change: privilegedContainer})
		toolFails(t, c, tsm, "no configfs-tsm provider: ", "no such device or address")
		// Only a privileged container gets as far.
		plain := runContainer(t, pod, harness.ContainerSpec{Image: image})
		toolFails(t, plain, tsm, "mount configfs: operation not permitted")
	})
}

// TestReportToolOnS390X is the same for what TestSE does in a guest.
func TestReportToolOnS390X(t *testing.T) {
	n := s390xNode(t)
	image := evidenceImage(t, n, "s390x")
	pod := runPod(t, n, harness.PodSpec{Handler: harness.HandlerS390X, Change: privilegedPod})
	c := runContainer(t, pod, harness.ContainerSpec{Image: image, Change: privilegedContainer})
	host, err := hostkey.NewKey(rand.Reader)
	require.NoError(t, err)
	request, secret, err := attest.NewRequest([]*ecdh.PublicKey{host.PublicKey()}, attest.ImageHostKey|attest.AttestHostKey, nil)
	require.NoError(t, err)
	exchange, err := attest.NewExchange(request, secret.Flags).Marshal()
	require.NoError(t, err)
	user := base64.StdEncoding.EncodeToString(make([]byte, attest.UserDataSize))
	toolFails(t, c, []string{"uv", base64.StdEncoding.EncodeToString(exchange), user}, "no /dev/uv: ",
		"/sys/class/misc/uv/dev: no such file or directory")
	toolFails(t, c, []string{"uv", base64.StdEncoding.EncodeToString(exchange[:40]), user}, "attestation exchange: ")
	t.Run("device rules", func(t *testing.T) { checkDeviceRules(t, pod, image) })
}
