// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"crypto/ecdh"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/cloister-project/cloister/tee"
	"github.com/cloister-project/cloister/tee/initdata"
	"github.com/cloister-project/cloister/tee/se/attest"
	"github.com/cloister-project/cloister/tee/se/hostkey"
	"github.com/cloister-project/cloister/tee/se/image"
	"github.com/cloister-project/cloister/tee/snp"
	"github.com/cloister-project/cloister/tee/snp/snpreport"
	"github.com/cloister-project/cloister/tee/tdx"
	"github.com/cloister-project/cloister/test/harness"
)

// The lanes below run on a machine with the hardware, and are skipped elsewhere with what `cloister check` says. Variables
// of the environment tell them what only the operator knows:
//
//	CLOISTER_TEST_TEE_CONFIG     settings (TOML) laid over the lane's: another QEMU, firmware with its digest, a Quote
//	                             Generation Service elsewhere
//	CLOISTER_TEST_SE_IMAGE       an image that was sealed for this machine by `cloister image se build`
//	CLOISTER_TEST_SE_INITDATA    the document that it was built with, if it was
//	CLOISTER_TEST_SE_HOST_KEYS   host key documents of this machine, separated by colons
const (
	envTEEConfig  = "CLOISTER_TEST_TEE_CONFIG"
	envSEImage    = "CLOISTER_TEST_SE_IMAGE"
	envSEInitdata = "CLOISTER_TEST_SE_INITDATA"
	envSEHostKeys = "CLOISTER_TEST_SE_HOST_KEYS"
)

// launchCases are the launches whose measurements are compared: with each other, and with what was predicted.
var launchCases = []struct {
	name      string
	vcpus     int
	parameter string
}{{"1 vCPU", 1, ""}, {"2 vCPUs", 2, ""}, {"another command line", 1, "e2e.measured=yes"}}

// launchSettings are what makes one of launchCases.
func launchSettings(vcpus int, parameter string) string {
	text := fmt.Sprintf("[sizing]\ndefault_vcpus = %d\n", vcpus)
	if parameter != "" {
		text += fmt.Sprintf("[hypervisor]\nkernel_params = [%q]\n", parameter)
	}
	return text
}

// laneSettings are a platform's settings for all of them, beside its name: more of the table tee, then other tables.
func laneSettings(t *testing.T, name tee.Name, initdataPath string) string {
	t.Helper()
	text := fmt.Sprintf("initdata = %q\n", initdataPath)
	if name == tee.TDX {
		return text + "[tee.tdx]\nquote_socket = 'unix:/var/run/tdx-qgs/qgs.socket'\n"
	}
	// What setup fetched, and else what the host has.
	descriptors, err := harness.SetupValue("CLOISTER_FIRMWARE_DESCRIPTORS")
	require.NoError(t, err)
	return text + fmt.Sprintf("firmware_descriptors = [%q, '/etc/qemu/firmware', '/usr/share/qemu/firmware']\n", descriptors)
}

// overlay lays text over a handler's configuration until the test's end. Names are in the order of their weight; those of
// onPlatform start with 60.
func overlay(t *testing.T, n *harness.Node, handler, name, text string) {
	t.Helper()
	require.NoError(t, n.WriteHandlerDropIn(handler, name, text))
	t.Cleanup(func() { assert.NoError(t, n.RemoveHandlerDropIn(handler, name)) })
}

// overlayOfOperator lays CLOISTER_TEST_TEE_CONFIG over a handler until the test's end.
func overlayOfOperator(t *testing.T, n *harness.Node, handler string) {
	t.Helper()
	path := os.Getenv(envTEEConfig)
	if path == "" {
		return
	}
	text, err := os.ReadFile(path)
	require.NoError(t, err, envTEEConfig)
	overlay(t, n, handler, "70-operator", string(text))
}

// skipWithoutHardware skips the test on a host that cannot launch VMs of the platform, with the tool's reasons.
func skipWithoutHardware(t *testing.T, n *harness.Node, name tee.Name) {
	t.Helper()
	reason, err := laneReason(name, checkTEE(t, n, handlerOf(name), name))
	require.NoError(t, err)
	if reason != "" {
		t.Skip(reason)
	}
}

// predicted is what `cloister measure` says of the pods that a handler's configuration starts.
func predicted(t *testing.T, n *harness.Node, name tee.Name, flags ...string) []tee.ReferenceValues {
	t.Helper()
	text := succeed(t, n.Command(testContext(t), append([]string{filepath.Join(n.Artifacts().Bin, "cloister"), "measure", "--tee",
		string(name),
		"--json", "--config", filepath.Join(n.Dir, handlerOf(name), "cloister.toml")}, flags...)...))
	var said struct {
		ReferenceValues []tee.ReferenceValues `json:"reference_values"`
	}
	require.NoError(t, json.Unmarshal([]byte(text), &said), text)
	return said.ReferenceValues
}

// predictedFor is the prediction for a number of CPUs, which must be the same when other numbers are asked for beside it.
func predictedFor(t *testing.T, n *harness.Node, name tee.Name, vcpus int) *tee.ReferenceValues {
	t.Helper()
	one := predicted(t, n, name)
	require.Len(t, one, 1, "one size of VM was asked for")
	require.Equal(t, vcpus, one[0].VCPUs)
	several := predicted(t, n, name, "--vcpus", "1,2")
	if name == tee.SE { // its values are those of the image, for any number
		require.Len(t, several, 1)
		require.Equal(t, one, several)
		return &one[0]
	}
	require.Len(t, several, 2)
	require.Equal(t, one[0].Values, several[vcpus-1].Values)
	return &one[0]
}

// valueOf is a predicted value, empty if there is none of the name.
func valueOf(want *tee.ReferenceValues, name string) string {
	for _, v := range want.Values {
		if v.Name == name {
			return v.Hex
		}
	}
	return ""
}

// differences collects what is not as it should be.
type differences []error

func (d *differences) same(what, got, want string) {
	if want == "" || got != want {
		*d = append(*d, fmt.Errorf("%s is %q, want %q", what, got, want))
	}
}

// checkSNPReport compares a report with what was asked, predicted and bound.
func checkSNPReport(raw, nonce []byte, want *tee.ReferenceValues, doc *initdata.Document) error {
	r, err := snpreport.Parse(raw)
	if err != nil {
		return err
	}
	var d differences
	d.same("the report data", hex.EncodeToString(r.ReportData[:]), hex.EncodeToString(nonce))
	d.same("the launch digest", hex.EncodeToString(r.Measurement[:]), valueOf(want, "snp.launch_digest"))
	d.same("the policy", hex.EncodeToString(binary.LittleEndian.AppendUint64(nil, r.Policy)), valueOf(want, "snp.policy"))
	d.same("the host data", hex.EncodeToString(r.HostData[:]), valueOf(want, "snp.host_data"))
	d.same("the host data", hex.EncodeToString(r.HostData[:]), hex.EncodeToString(initdata.Bind(doc.Digest(), 32)))
	if r.Policy&uint64(snp.PolicyDebug) != 0 {
		d = append(d, errors.New("the policy allows debugging"))
	}
	if r.VMPL != 0 {
		d = append(d, fmt.Errorf("the report is of VMPL %d, the kernel runs at 0", r.VMPL))
	}
	return errors.Join(d...)
}

// checkTDXQuote is checkSNPReport for a quote.
func checkTDXQuote(raw, nonce []byte, want *tee.ReferenceValues, doc *initdata.Document) error {
	q, err := tdx.ParseQuote(raw)
	if err != nil {
		return err
	}
	var d differences
	if err := q.Compare(want); err != nil {
		d = append(d, err)
	}
	d.same("the report data", hex.EncodeToString(q.ReportData[:]), hex.EncodeToString(nonce))
	d.same("MRCONFIGID", q.MRConfigID.String(), hex.EncodeToString(initdata.Bind(doc.Digest(), 48)))
	if q.Attributes&tdx.AttributeDebug != 0 {
		d = append(d, errors.New("the attributes allow debugging"))
	}
	return errors.Join(d...)
}

// hardwareInitdata is the path of an initdata document, and the document.
func hardwareInitdata(t *testing.T) (path string, doc *initdata.Document) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "initdata.toml")
	require.NoError(t, os.WriteFile(path, []byte(testInitdata), 0o600))
	doc, err := initdata.Parse([]byte(testInitdata))
	require.NoError(t, err)
	return path, doc
}

// tsmReport fetches a report with a nonce in a guest.
func tsmReport(t *testing.T, n *harness.Node, pod *harness.Pod, provider string) (nonce, report []byte) {
	t.Helper()
	nonce = randomBytes(64)
	c := runContainer(t, pod, harness.ContainerSpec{Image: evidenceImage(t, n, hostArch()), Change: privilegedContainer})
	text, err := c.Output(testContext(t), evidenceTool, "tsm", base64.StdEncoding.EncodeToString(nonce))
	require.NoError(t, err)
	var said struct {
		Provider string
		Report   []byte
	}
	require.NoError(t, json.Unmarshal([]byte(text), &said), text)
	assert.Equal(t, provider, said.Provider)
	return nonce, said.Report
}

// checkLaunches starts a pod for each of launchCases and compares its report with the prediction for it, and with that
// for the others, which must not fit.
func checkLaunches(t *testing.T, name tee.Name, provider, mainValue string,
	check func(raw, nonce []byte, want *tee.ReferenceValues, doc *initdata.Document) error) {
	n := sharedNode(t)
	overlayOfOperator(t, n, handlerOf(name))
	path, doc := hardwareInitdata(t)
	onPlatform(t, n, handlerOf(name), name, laneSettings(t, name, path))
	skipWithoutHardware(t, n, name)
	var earlier []*tee.ReferenceValues
	for _, c := range launchCases {
		t.Run(c.name, func(t *testing.T) {
			overlay(t, n, handlerOf(name), "65-launch", launchSettings(c.vcpus, c.parameter))
			want := predictedFor(t, n, name, c.vcpus)
			pod := runPod(t, n, harness.PodSpec{Handler: handlerOf(name), Change: privilegedPod})
			_, info, err := pod.Status(testContext(t))
			require.NoError(t, err)
			assert.Contains(t, info["tee"], name.Describe())
			assert.Contains(t, info["launchMeasurement"], valueOf(want, mainValue))
			assert.Equal(t, fmt.Sprint(c.vcpus), info["vcpus"])

			nonce, report := tsmReport(t, n, pod, provider)
			require.NoError(t, check(report, nonce, want, doc))
			for _, other := range earlier {
				if slices.Equal(other.Values, want.Values) { // TDX, with firmware whose RTMR0 cannot be predicted
					require.Empty(t, c.parameter, "the command line shows in no prediction")
					continue
				}
				require.Error(t, check(report, nonce, other, doc), "the report fits the prediction for another launch")
			}
			earlier = append(earlier, want)
		})
	}
}

// TestSNP: pods in SEV-SNP VMs, whose reports say what `cloister measure` predicts, for each launch another digest.
func TestSNP(t *testing.T) {
	checkLaunches(t, tee.SNP, "sev_guest", "snp.launch_digest", checkSNPReport)
}

// TestTDX: pods in trust domains, whose quotes say what `cloister measure` predicts. It needs a Quote Generation Service,
// at Intel's usual place or where CLOISTER_TEST_TEE_CONFIG says. The number of CPUs shows in RTMR0 and the command line in
// RTMR2, where the firmware is one whose events are known.
func TestTDX(t *testing.T) {
	checkLaunches(t, tee.TDX, "tdx_guest", "tdx.mrtd", checkTDXQuote)
}

// TestSE: a pod in a Secure Execution guest, whose evidence is that of the image.
func TestSE(t *testing.T) {
	n := sharedNode(t)
	imagePath, initdataPath := os.Getenv(envSEImage), os.Getenv(envSEInitdata)
	overlayOfOperator(t, n, handlerOf(tee.SE))
	if imagePath == "" {
		// The platform cannot be configured without one, but looked at.
		overlay(t, n, handlerOf(tee.SE), "60-test", "[hypervisor]\naccel = 'auto'\nvsock = 'auto'\n")
		reason, err := laneReason(tee.SE, checkTEE(t, n, handlerOf(tee.SE), tee.SE))
		require.NoError(t, err)
		t.Skip(reason + "; " + envSEImage + " names no image that was sealed for this machine")
	}
	onPlatform(t, n, handlerOf(tee.SE), tee.SE,
		fmt.Sprintf("initdata = %q\n[tee.se]\nimage = %q\n[hypervisor]\naccel = 'auto'\nvsock = 'auto'\n", initdataPath, imagePath))
	skipWithoutHardware(t, n, tee.SE)
	info, err := image.InspectFile(imagePath)
	require.NoError(t, err)
	want := predicted(t, n, tee.SE)
	require.Len(t, want, 1)
	require.Equal(t, info.Tag.String(), valueOf(&want[0], "se.tag"))

	t.Run("pod", func(t *testing.T) { checkSEPod(t, n, info, initdataPath) })
	t.Run("changed image", func(t *testing.T) {
		changed, err := os.ReadFile(imagePath)
		require.NoError(t, err)
		require.NotEmpty(t, info.Components)
		changed[info.Components[0].Address+info.Components[0].Size/2] ^= 1
		path := filepath.Join(t.TempDir(), "changed.img")
		require.NoError(t, os.WriteFile(path, changed, 0o600))
		overlay(t, n, handlerOf(tee.SE), "65-changed", fmt.Sprintf("[tee.se]\nimage = %q\n", path))
		requireNoPod(t, n, harness.PodSpec{Handler: handlerOf(tee.SE)}, "the ultravisor refused the image")
	})
}

// checkSEPod starts the image and asks the ultravisor for evidence of it.
func checkSEPod(t *testing.T, n *harness.Node, info *image.Info, initdataPath string) {
	pod := runPod(t, n, harness.PodSpec{Handler: handlerOf(tee.SE), Change: privilegedPod})
	_, status, err := pod.Status(testContext(t))
	require.NoError(t, err)
	assert.Contains(t, status["tee"], tee.SE.Describe())
	assert.Contains(t, status["launchMeasurement"], info.Tag.String())
	c := runContainer(t, pod, harness.ContainerSpec{Image: evidenceImage(t, n, "s390x"), Change: privilegedContainer})
	// Linux, arch/s390/kernel/uv.c: the ultravisor tells a guest that it is a protected one.
	assert.Equal(t, "1", output(t, c, "cat /sys/firmware/uv/prot_virt_guest"))

	var digest []byte
	if initdataPath != "" {
		text, err := os.ReadFile(initdataPath)
		require.NoError(t, err, envSEInitdata)
		doc, err := initdata.Parse(text)
		require.NoError(t, err, envSEInitdata)
		digest = doc.Digest()
	}
	keys, reason, err := seHostKeys(os.Getenv(envSEHostKeys))
	require.NoError(t, err)
	if reason != "" {
		t.Skip(reason)
	}
	request, secret, err := attest.NewRequest(keys, attest.ImageHostKey|attest.AttestHostKey, nil)
	require.NoError(t, err)
	user := attest.UserData(digest)
	answer := seAnswer(t, c, attest.NewExchange(request, secret.Flags), user[:])
	evidence, err := attest.Verify(secret, info.Header(), answer)
	require.NoError(t, err)
	assert.Equal(t, image.Hex(user[:]), evidence.User)
	assert.Len(t, evidence.CUID, attest.CUIDSize)
	assert.NotEmpty(t, evidence.ImageHostKey)
	assert.NotEmpty(t, evidence.AttestHostKey)

	// The same answer proves nothing about another image, nor with another document.
	other := *info.Header()
	other.Tag[0] ^= 1
	_, err = attest.Verify(secret, &other, answer)
	require.Error(t, err)
	answer.User = append([]byte{answer.User[0] ^ 1}, answer.User[1:]...)
	_, err = attest.Verify(secret, info.Header(), answer)
	require.Error(t, err)
}

// seHostKeys reads a list of documents, or says why there is none. The keys are believed as they are: package
// tee/se/hostkey's own tests are about who vouches for them.
func seHostKeys(list string) (keys []*ecdh.PublicKey, reason string, err error) {
	if list == "" {
		return nil, envSEHostKeys + " names no host key document of this machine: without one the pod runs, and no evidence can be asked for", nil
	}
	for path := range strings.SplitSeq(list, ":") {
		d, err := hostkey.ReadUnverified(path)
		if err != nil {
			return nil, "", fmt.Errorf("%s: %w", envSEHostKeys, err)
		}
		keys = append(keys, d.Key)
	}
	return keys, "", nil
}

// seAnswer has a guest answer a request.
func seAnswer(t *testing.T, c *harness.Container, request *attest.Exchange, user []byte) *attest.Exchange {
	t.Helper()
	raw, err := request.Marshal()
	require.NoError(t, err)
	text, err := c.Output(testContext(t), evidenceTool, "uv", base64.StdEncoding.EncodeToString(raw), base64.StdEncoding.EncodeToString(user))
	require.NoError(t, err)
	raw, err = base64.StdEncoding.DecodeString(text)
	require.NoError(t, err)
	answer, err := attest.ParseExchange(raw)
	require.NoError(t, err)
	return answer
}
