// SPDX-License-Identifier: Apache-2.0

package main

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/cloister-project/cloister/tee"
	"github.com/cloister-project/cloister/tee/firmware"
	"github.com/cloister-project/cloister/tee/firmware/firmwaretest"
	"github.com/cloister-project/cloister/tee/snp"
	"github.com/cloister-project/cloister/virtcontainers/dryrun"
)

func TestMeasureText(t *testing.T) {
	n := newNode(t, "")
	status, stdout, stderr := cloister(t, "measure", "--config", n.config, "--tee", "snp", "--vcpus", "1-2,4",
		"--cpu-model", "EPYC-v4,EPYC-Milan")
	require.Equal(t, exitOK, status, stderr)
	n.golden(t, "measure-snp.golden", stdout)
}

func TestMeasureJSON(t *testing.T) {
	n := newNode(t, "")
	status, stdout, stderr := cloister(t, "measure", "--config", n.config, "--tee", "snp", "--vcpus", "1-64", "--json")
	require.Equal(t, exitOK, status, stderr)
	var m dryrun.Measurement
	require.NoError(t, json.Unmarshal([]byte(stdout), &m))
	assert.True(t, m.Predicted)
	require.Len(t, m.ReferenceValues, 64)
	// The digest of the launch, computed here from its parts.
	l := snp.Launch{Firmware: firmwaretest.SNP().Bytes(), CPUSignature: 0x800f12, GuestFeatures: 1, Hashes: &snp.Hashes{
		Kernel: sha256.Sum256([]byte(bzImage("kernel"))), Initrd: sha256.Sum256([]byte("initrd")),
		Parameters: snp.HashParameters(m.ReferenceValues[0].Parameters),
	}}
	digests, err := l.Digests(1, 64)
	require.NoError(t, err)
	for i, r := range m.ReferenceValues {
		assert.Equal(t, i+1, r.VCPUs)
		assert.Equal(t, "EPYC-v4", r.CPUModel)
		require.Equal(t, "snp.launch_digest", r.Values[0].Name)
		assert.Equal(t, hex.EncodeToString(digests[i][:]), r.Values[0].Hex)
		assert.Len(t, r.Inputs, 3)
	}
}

// What a plan would start and what is measured must be of the same pod.
func TestMeasureOfAPod(t *testing.T) {
	n := newNode(t, allowInitdata)
	file := n.write(t, "pod.yaml", webPod)
	status, stdout, stderr := cloister(t, "measure", "--config", n.config, "-f", file, "--json")
	require.Equal(t, exitOK, status, stderr)
	var m dryrun.Measurement
	require.NoError(t, json.Unmarshal([]byte(stdout), &m))
	require.Len(t, m.ReferenceValues, 1)
	assert.Equal(t, 2, m.ReferenceValues[0].VCPUs)
}

func TestMeasureOtherFiles(t *testing.T) {
	n := newNode(t, "")
	digest := func(args ...string) string {
		status, stdout, stderr := cloister(t, append([]string{"measure", "--config", n.config, "--tee", "snp", "--json"}, args...)...)
		require.Equal(t, exitOK, status, stderr)
		var m dryrun.Measurement
		require.NoError(t, json.Unmarshal([]byte(stdout), &m))
		return m.ReferenceValues[0].Values[0].Hex
	}
	same := digest()
	other := n.write(t, "other", bzImage("other"))
	assert.Equal(t, same, digest("--kernel", n.path("vmlinuz"), "--initrd", n.path("initrd.img"), "--firmware", n.path("OVMF.fd")))
	assert.NotEqual(t, same, digest("--kernel", other))
	assert.NotEqual(t, same, digest("--initrd", other))
	assert.NotEqual(t, digest("--kernel", other), digest("--initrd", other))

	status, _, stderr := cloister(t, "measure", "--config", n.config, "--tee", "snp", "--firmware", other)
	assert.Equal(t, exitNo, status)
	assert.Contains(t, stderr, other)
}

func TestNothingToMeasure(t *testing.T) {
	n := newNode(t, "")
	for _, args := range [][]string{nil, {"--tee", "none"}, {"--tee", "sample"}} {
		status, stdout, stderr := cloister(t, append([]string{"measure", "--config", n.config}, args...)...)
		assert.Equal(t, exitNo, status)
		assert.Empty(t, stdout)
		assert.Contains(t, stderr, "no hardware measures it")
	}
	status, _, stderr := cloister(t, "measure", "--config", n.config, "--tee", "snp", "--cpu-model", "host")
	assert.Equal(t, exitNo, status)
	assert.Contains(t, stderr, "depends on the machine")
	status, _, stderr = cloister(t, "measure", "--config", n.config, "--tee", "snp", "--vcpus", "1-4096", "--cpu-model", "EPYC,EPYC-Milan")
	assert.Equal(t, exitUsage, status)
	assert.Contains(t, stderr, "8192 variants")
	require.NoError(t, os.Remove(n.path("initrd.img")))
	status, _, stderr = cloister(t, "measure", "--config", n.config, "--tee", "snp")
	assert.Equal(t, exitNo, status)
	assert.Contains(t, stderr, n.path("initrd.img"))
}

func TestCounts(t *testing.T) {
	counts, err := parseCounts("1-3,8,2-4")
	require.NoError(t, err)
	assert.Equal(t, []int{1, 2, 3, 8, 4}, counts)
	counts, err = parseCounts("")
	require.NoError(t, err)
	assert.Empty(t, counts)
	models, err := parseModels("EPYC,EPYC-Milan,EPYC")
	require.NoError(t, err)
	assert.Equal(t, []string{"EPYC", "EPYC-Milan"}, models)
}

// tdxFirmware is an image that a TD could start with, of a build of which only MRTD is known.
func tdxFirmware() firmwaretest.Image {
	const size = 2 * firmware.PageSize // as firmwaretest makes them
	return firmwaretest.Image{TDX: []firmware.TDXSection{
		{RawSize: size, MemAddress: 1<<32 - size, MemSize: size, Type: firmware.TDXBootFirmware, Attributes: firmware.TDXExtend},
		{MemAddress: 0x810000, MemSize: 0x10000, Type: firmware.TDXTemporaryMemory},
		{MemAddress: 0x809000, MemSize: 0x2000, Type: firmware.TDXHandOff},
	}}
}

// A register without a value is nowhere among the values: whoever compares would compare with nothing.
func TestUnpredictedRegisters(t *testing.T) {
	n := nodeWithFirmware(t, tdxFirmware().Bytes(), "")
	status, stdout, stderr := cloister(t, "measure", "--config", n.config, "--tee", "tdx", "--vcpus", "1-3", "--json")
	require.Equal(t, exitOK, status, stderr)
	assert.NotContains(t, stdout, `"hex": ""`)
	var m dryrun.Measurement
	require.NoError(t, json.Unmarshal([]byte(stdout), &m))
	require.Len(t, m.ReferenceValues, 3)
	for _, r := range m.ReferenceValues {
		var names []string
		for _, v := range r.Values {
			assert.NotEmpty(t, v.Hex, v.Name)
			names = append(names, v.Name)
		}
		assert.Equal(t, []string{"tdx.mrtd", "tdx.mrtd_two_pass", "tdx.mrconfigid", "tdx.attributes"}, names)
	}
	lines := strings.Split(strings.TrimSpace(stderr), "\n")
	require.Len(t, lines, 3, "one for each register, not for each variant")
	for i, line := range lines {
		assert.Regexp(t, fmt.Sprintf("^cloister: tdx.rtmr%d is not predicted: .*firmware", i), line)
	}

	status, stdout, same := cloister(t, "measure", "--config", n.config, "--tee", "tdx", "--vcpus", "1-3")
	require.Equal(t, exitOK, status)
	assert.Equal(t, stderr, same)
	assert.NotContains(t, stdout, "rtmr")
	assert.Contains(t, stdout, "\ntdx.mrtd (")
}

// The bytes are those of the evidence, the number is in the note.
func TestByteOrderOfNumbers(t *testing.T) {
	value := func(n *node, platform, name string) tee.Value {
		status, stdout, stderr := cloister(t, "measure", "--config", n.config, "--tee", platform, "--json")
		require.Equal(t, exitOK, status, stderr)
		var m dryrun.Measurement
		require.NoError(t, json.Unmarshal([]byte(stdout), &m))
		for _, v := range m.ReferenceValues[0].Values {
			if v.Name == name {
				return v
			}
		}
		require.Fail(t, "there is no "+name)
		return tee.Value{}
	}
	policy := value(newNode(t, ""), "snp", "snp.policy")
	assert.Equal(t, tee.Value{Name: "snp.policy", Hex: "0000030000000000", Note: "0x30000 (smt, abi>=0.0)"}, policy)
	attributes := value(nodeWithFirmware(t, tdxFirmware().Bytes(), ""), "tdx", "tdx.attributes")
	assert.Equal(t, "0000001000000000", attributes.Hex)
	assert.Regexp(t, "^0x10000000; ", attributes.Note)
}

// Who gets a damaged image needs it again, not another build; and what an image says to another platform is no fault.
func TestFirmwareOfTheOtherPlatform(t *testing.T) {
	both := firmwaretest.SNP()
	both.TDX = tdxFirmware().TDX
	badTDX := both.Bytes()
	copy(badTDX[len(badTDX)-0xe00:], "XXXX")
	badSNP := both.Bytes()
	copy(badSNP[len(badSNP)-0x800:], "XXXX")
	for _, tc := range []struct {
		name, platform string
		firmware       []byte
		want           []string // nothing: it is measured
	}{
		{"both", "snp", both.Bytes(), nil},
		{"both", "tdx", both.Bytes(), nil},
		{"bad TDX metadata", "snp", badTDX, nil},
		{"bad SNP metadata", "tdx", badSNP, nil},
		{"bad TDX metadata", "tdx", badTDX, []string{`no "TDVF"`, "the file is damaged"}},
		{"bad SNP metadata", "snp", badSNP, []string{`no "ASEV"`, "the file is damaged"}},
		{"cut off", "snp", both.Bytes()[:5000], []string{"5000 bytes", "the file is damaged"}},
		{"cut off", "tdx", both.Bytes()[:5000], []string{"5000 bytes", "the file is damaged"}},
	} {
		t.Run(tc.name+" on "+tc.platform, func(t *testing.T) {
			n := nodeWithFirmware(t, tc.firmware, "")
			status, stdout, stderr := cloister(t, "measure", "--config", n.config, "--tee", tc.platform)
			if tc.want == nil {
				require.Equal(t, exitOK, status, stderr)
				return
			}
			assert.Equal(t, exitNo, status)
			assert.Empty(t, stdout)
			for _, want := range tc.want {
				assert.Contains(t, stderr, want)
			}
			assert.NotContains(t, stderr, "AmdSev")
			assert.LessOrEqual(t, strings.Count(stderr, "invalid argument"), 1, stderr)
		})
	}
}

// An error's kind is for programs; people read it once at most.
func TestErrorsSayTheirKindOnce(t *testing.T) {
	n := newNode(t, "se = {image = '/bin/sh'}\n[sizing]\ndefault_memory_mib = 256\n[hypervisor2]")
	text, err := os.ReadFile(n.config)
	require.NoError(t, err)
	config := n.write(t, "cloister.toml", strings.NewReplacer(`arch = "amd64"`, "", "[hypervisor2]", "").Replace(string(text)))
	broken := nodeWithFirmware(t, []byte("no firmware"), "")
	for _, args := range [][]string{
		{"measure", "--config", config, "--tee", "se"},
		{"plan", "--config", config, "--tee", "se"},
		{"measure", "--config", broken.config, "--tee", "snp"},
		{"measure", "--config", broken.config, "--tee", "tdx"},
		{"plan", "--config", broken.config, "--tee", "tdx"},
		{"measure", "--config", n.config, "--tee", "snp", "--cpu-model", "host"},
		{"measure", "--config", n.config, "--tee", "snp", "--cpu-model", "nonsense"},
	} {
		status, stdout, stderr := cloister(t, args...)
		assert.Equal(t, exitNo, status, "%v", args)
		assert.Empty(t, stdout, "%v", args)
		assert.LessOrEqual(t, strings.Count(stderr, "invalid argument"), 1, "%v: %s", args, stderr)
		assert.NotContains(t, stderr, "(invalid argument)", "%v", args)
	}
}
