// SPDX-License-Identifier: Apache-2.0

package main

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"os"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/cloister-project/cloister/tee/firmware/firmwaretest"
	"github.com/cloister-project/cloister/tee/snp"
)

func TestMeasureText(t *testing.T) {
	n := newNode(t, "")
	status, stdout, stderr := cloister(t, "measure", "--config", n.config, "--tee", "snp", "--vcpus", "1-2,4", "--cpu-model", "EPYC-v4,EPYC-Milan")
	require.Equal(t, exitOK, status, stderr)
	n.golden(t, "measure-snp.golden", stdout)
}

func TestMeasureJSON(t *testing.T) {
	n := newNode(t, "")
	status, stdout, stderr := cloister(t, "measure", "--config", n.config, "--tee", "snp", "--vcpus", "1-64", "--json")
	require.Equal(t, exitOK, status, stderr)
	var m measurement
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
	var m measurement
	require.NoError(t, json.Unmarshal([]byte(stdout), &m))
	require.Len(t, m.ReferenceValues, 1)
	assert.Equal(t, 2, m.ReferenceValues[0].VCPUs)
}

func TestMeasureOtherFiles(t *testing.T) {
	n := newNode(t, "")
	digest := func(args ...string) string {
		status, stdout, stderr := cloister(t, append([]string{"measure", "--config", n.config, "--tee", "snp", "--json"}, args...)...)
		require.Equal(t, exitOK, status, stderr)
		var m measurement
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
	for _, name := range []string{"", "none", "sample"} {
		status, stdout, stderr := cloister(t, "measure", "--config", n.config, "--tee", name)
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
}

func TestRuns(t *testing.T) {
	counts := []int{1, 2, 3, 8, 4, 5}
	assert.Equal(t, [][]int{{1, 2, 3}, {8}, {4, 5}}, runs(counts, true))
	assert.Equal(t, [][]int{{1}, {2}, {3}, {8}, {4}, {5}}, runs(counts, false))
	assert.Equal(t, [][]int{{0}}, runs([]int{0}, true))
	assert.Equal(t, []int{1, 2, 3, 8, 4, 5}, counts)
}
