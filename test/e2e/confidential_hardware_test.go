// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/cloister-project/cloister/tee"
	"github.com/cloister-project/cloister/tee/initdata"
	"github.com/cloister-project/cloister/test/harness"
)

// teeReport is what `cloister check --tee NAME --json` prints, as far as it matters here.
type teeReport struct {
	Platforms []struct {
		Platform tee.Name
		Findings []teeFinding
	}
}

type teeFinding struct {
	What, Result, Detail, Fix string
}

// checkTEE asks the operator's tool what this host lacks for a platform with the handler's configuration.
func checkTEE(t *testing.T, n *harness.Node, handler string, name tee.Name) (missing []teeFinding) {
	t.Helper()
	r := run(t, n.Command(testContext(t), filepath.Join(n.Artifacts().Bin, "cloister"), "check", "--tee", string(name), "--json",
		"--config", filepath.Join(n.Dir, handler, "cloister.toml")))
	var said teeReport
	require.NoError(t, json.Unmarshal([]byte(r.stdout), &said), "%s%s", r.stdout, r.stderr)
	require.Len(t, said.Platforms, 1)
	require.Equal(t, name, said.Platforms[0].Platform)
	require.NotEmpty(t, said.Platforms[0].Findings)
	for _, f := range said.Platforms[0].Findings {
		if strings.EqualFold(f.Result, string(tee.Missing)) {
			missing = append(missing, f)
		}
	}
	return missing
}

// onPlatform lays a platform over a handler's configuration until the test's end.
func onPlatform(t *testing.T, n *harness.Node, handler string, name tee.Name, more string) {
	t.Helper()
	require.NoError(t, n.WriteHandlerDropIn(handler, "60-test", fmt.Sprintf("[tee]\nplatform = %q\n%s", name, more)))
	t.Cleanup(func() { assert.NoError(t, n.RemoveHandlerDropIn(handler, "60-test")) })
}

// handlerOf is the handler of the platform's architecture that has a configuration of its own.
func handlerOf(name tee.Name) string {
	if name == tee.SE {
		return harness.HandlerSealed
	}
	return harness.HandlerSample
}

// reasonLine is a line of tee.UnsupportedError.
var reasonLine = regexp.MustCompile(`(?m)^  - (.*)$`)

// TestConfidentialPlatformsThatThisHostLacks: a pod never falls back to less protection. It fails before anything is made,
// with what is missing and what to do, in the words of `cloister check`.
func TestConfidentialPlatformsThatThisHostLacks(t *testing.T) {
	n := sharedNode(t)
	for _, name := range []tee.Name{tee.SNP, tee.TDX, tee.SE} {
		t.Run(string(name), func(t *testing.T) {
			handler, more := handlerOf(name), ""
			if name == tee.SE {
				if err := n.Artifacts().CheckS390X(); err != nil {
					skipLane(t, err.Error())
				}
				image := filepath.Join(t.TempDir(), "se.img")
				require.NoError(t, os.WriteFile(image, make([]byte, 4096), 0o600))
				more = fmt.Sprintf("[tee.se]\nimage = %q\n", image)
				// The handler emulates, which this platform refuses by itself.
				more += "[hypervisor]\naccel = 'auto'\nvsock = 'auto'\n"
			}
			onPlatform(t, n, handler, name, more)
			missing := checkTEE(t, n, handler, name)
			if len(missing) == 0 {
				t.Skip("this host has it: see the tests of the platform itself")
			}
			pod, err := n.CRI().RunPod(testContext(t), harness.PodSpec{Handler: handler})
			if err == nil {
				require.NoError(t, pod.Remove(testContext(t)))
			}
			require.Error(t, err)
			t.Logf("the error: %v", err)
			require.ErrorContains(t, err, "this host cannot launch "+string(name)+" VMs:")
			reasons := reasonLine.FindAllStringSubmatch(err.Error(), -1)
			require.NotEmpty(t, reasons)
			var said []string
			for _, f := range missing {
				said = append(said, fmt.Sprintf("%s: %s; %s", f.What, f.Detail, f.Fix))
			}
			for _, r := range reasons {
				assert.Contains(t, said, r[1], "cloister check says it in other words")
			}
			requireNothingLeft(t, n)
		})
	}
}

// hardwarePod starts a pod on a platform with hardware behind it, with initdata where that shows in a report. The test is
// skipped on a host that lacks something, with what `cloister check` says about it.
func hardwarePod(t *testing.T, n *harness.Node, name tee.Name, more string) (*harness.Pod, map[string]string) {
	t.Helper()
	handler := handlerOf(name)
	onPlatform(t, n, handler, name, more)
	if missing := checkTEE(t, n, handler, name); len(missing) > 0 {
		var reasons []string
		for _, f := range missing {
			reasons = append(reasons, f.What+": "+f.Detail)
		}
		t.Skipf("this host cannot launch %s VMs: %s", name, strings.Join(reasons, "; "))
	}
	pod := runPod(t, n, harness.PodSpec{Handler: handler, Change: privilegedPod})
	_, info, err := pod.Status(testContext(t))
	require.NoError(t, err)
	assert.Contains(t, info["tee"], name.Describe())
	return pod, measured(t, n, handler, name)
}

// measured is what `cloister measure` predicts for the pod's VM, by the values' names.
func measured(t *testing.T, n *harness.Node, handler string, name tee.Name) map[string]string {
	t.Helper()
	text := succeed(t, n.Command(testContext(t), filepath.Join(n.Artifacts().Bin, "cloister"), "measure", "--tee", string(name), "--json",
		"--config", filepath.Join(n.Dir, handler, "cloister.toml")))
	var said struct {
		ReferenceValues []tee.ReferenceValues `json:"reference_values"`
	}
	require.NoError(t, json.Unmarshal([]byte(text), &said), text)
	all := said.ReferenceValues
	require.Len(t, all, 1, "one size of VM was asked for")
	values := map[string]string{}
	for _, v := range all[0].Values {
		values[v.Name] = v.Hex
	}
	return values
}

// reportScript asks the guest's kernel for a report with 64 bytes of nonce (Linux, Documentation/ABI/testing/configfs-tsm).
const reportScript = `mkdir -p /tmp/cfg && mount -t configfs none /tmp/cfg && cd /tmp/cfg/tsm/report && mkdir -p test && cd test &&
printf %s | base64 -d > inblob && base64 outblob && cd .. && rmdir test`

// report fetches evidence with a nonce, in a privileged container of the guest.
func report(t *testing.T, pod *harness.Pod) (nonce, evidence []byte) {
	t.Helper()
	nonce = randomBytes(64)
	c := runContainer(t, pod, harness.ContainerSpec{Change: privilegedContainer})
	text := output(t, c, fmt.Sprintf(reportScript, base64.StdEncoding.EncodeToString(nonce)))
	evidence, err := base64.StdEncoding.DecodeString(strings.Join(strings.Fields(text), ""))
	require.NoError(t, err)
	return nonce, evidence
}

// hardwareInitdata is a setting with an initdata document, and the document.
func hardwareInitdata(t *testing.T) (setting string, doc *initdata.Document) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "initdata.toml")
	require.NoError(t, os.WriteFile(path, []byte(testInitdata), 0o600))
	doc, err := initdata.Parse([]byte(testInitdata))
	require.NoError(t, err)
	return fmt.Sprintf("initdata = %q\n", path), doc
}

// TestSNP: a pod in an SEV-SNP VM, whose report says what `cloister measure` predicts.
func TestSNP(t *testing.T) {
	n := sharedNode(t)
	setting, doc := hardwareInitdata(t)
	pod, want := hardwarePod(t, n, tee.SNP, setting)
	nonce, evidence := report(t, pod)
	// SEV-SNP Firmware ABI 1.58, table 23: ATTESTATION_REPORT.
	require.Len(t, evidence, 0x4A0)
	assert.Equal(t, want["snp.policy"], fmt.Sprintf("%016x", binary.LittleEndian.Uint64(evidence[0x08:])))
	assert.Equal(t, nonce, evidence[0x50:0x90])
	assert.Equal(t, want["snp.launch_digest"], hex.EncodeToString(evidence[0x90:0xC0]))
	assert.Equal(t, initdata.Bind(doc.Digest(), 32), evidence[0xC0:0xE0])
}

// TestTDX: a pod in a trust domain, whose quote says what `cloister measure` predicts. It needs a Quote Generation Service
// at Intel's usual place.
func TestTDX(t *testing.T) {
	n := sharedNode(t)
	setting, doc := hardwareInitdata(t)
	pod, want := hardwarePod(t, n, tee.TDX, setting+"[tee.tdx]\nquote_socket = 'unix:/var/run/tdx-qgs/qgs.socket'\n")
	nonce, evidence := report(t, pod)
	// Intel TDX DCAP Quoting Library API, appendix A: version 4 has its body behind a header of 48 bytes, version 5 a type
	// and a size between the two.
	require.Greater(t, len(evidence), 54+584)
	body := evidence[48:]
	if binary.LittleEndian.Uint16(evidence) >= 5 {
		body = evidence[54:]
	}
	field := func(at int) string { return hex.EncodeToString(body[at : at+48]) }
	assert.Contains(t, []string{want["tdx.mrtd"], want["tdx.mrtd_two_pass"]}, field(136))
	assert.Equal(t, hex.EncodeToString(initdata.Bind(doc.Digest(), 48)), field(184))
	for i, at := range []int{328, 376, 424} {
		if w, ok := want[fmt.Sprintf("tdx.rtmr%d", i)]; ok {
			assert.Equal(t, w, field(at), "RTMR%d", i)
		}
	}
	assert.Equal(t, nonce, body[520:584])
}

// TestSE: a pod in a Secure Execution guest. The image must have been sealed for this machine: CLOISTER_TEST_SE_IMAGE.
func TestSE(t *testing.T) {
	image := os.Getenv("CLOISTER_TEST_SE_IMAGE")
	var machine unix.Utsname
	require.NoError(t, unix.Uname(&machine))
	if image == "" && strings.HasPrefix(unix.ByteSliceToString(machine.Machine[:]), "s390") {
		t.Skip("CLOISTER_TEST_SE_IMAGE names no image that was sealed for this machine (cloister image se build)")
	}
	n := sharedNode(t)
	if image == "" {
		// Not this architecture: the platform's own check gives the reason.
		image = filepath.Join(t.TempDir(), "se.img")
		require.NoError(t, os.WriteFile(image, make([]byte, 4096), 0o600))
	}
	pod, want := hardwarePod(t, n, tee.SE, fmt.Sprintf("[tee.se]\nimage = %q\n[hypervisor]\naccel = 'auto'\nvsock = 'auto'\n", image))
	require.NotEmpty(t, want["se.tag"])
	_, info, err := pod.Status(testContext(t))
	require.NoError(t, err)
	assert.Contains(t, info["launchMeasurement"], want["se.tag"])
	c := runContainer(t, pod, harness.ContainerSpec{Change: privilegedContainer})
	// Linux, arch/s390/kernel/uv.c: the ultravisor tells a guest that it is a protected one.
	assert.Equal(t, "1", output(t, c, "cat /sys/firmware/uv/prot_virt_guest"))
}
