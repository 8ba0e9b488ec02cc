// SPDX-License-Identifier: Apache-2.0

package main

import (
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/cloister-project/cloister/tee"
	"github.com/cloister-project/cloister/virtcontainers/dryrun"
)

// tdxNode is a node with files that a TD could start with, and a QEMU; the test is skipped without them.
func tdxNode(t *testing.T) (config, qemu string) {
	t.Helper()
	path := func(name string) string {
		value := os.Getenv(name)
		if value == "" {
			t.Skipf("%s names no file; the Makefile's targets set it", name)
		}
		return value
	}
	qemu, fw, kernel := path("CLOISTER_TEST_QEMU"), path("CLOISTER_TEST_OVMF_TDX"), path("CLOISTER_TEST_KERNEL")
	image, err := os.ReadFile(fw)
	require.NoError(t, err)
	dir := t.TempDir()
	initrd := filepath.Join(dir, "initrd")
	require.NoError(t, os.WriteFile(initrd, []byte("initrd"), 0o600))
	config = filepath.Join(dir, "cloister.toml")
	require.NoError(t, os.WriteFile(config, fmt.Appendf(nil, `
[hypervisor]
arch = "amd64"
path = %q
kernel = %q
initrd = %q
[tee.tdx]
firmware = %q
firmware_digests = ["%x"]
`, qemu, kernel, initrd, fw, sha256.Sum256(image)), 0o600))
	return config, qemu
}

// rtmr0 measures and returns RTMR0 by the number of CPUs.
func rtmr0(t *testing.T, config string, args ...string) (byCPUs map[int]tee.Value, stderr string) {
	t.Helper()
	status, stdout, stderr := cloister(t, append([]string{"measure", "--config", config, "--tee", "tdx", "--json"}, args...)...)
	require.Equal(t, exitOK, status, stderr)
	var m dryrun.Measurement
	require.NoError(t, json.Unmarshal([]byte(stdout), &m))
	byCPUs = make(map[int]tee.Value)
	for _, r := range m.ReferenceValues {
		for _, v := range r.Values {
			if v.Name == "tdx.rtmr0" {
				byCPUs[r.VCPUs] = v
			}
		}
	}
	return byCPUs, stderr
}

func TestACPIFromQEMU(t *testing.T) {
	config, qemu := tdxNode(t)
	out := filepath.Join(t.TempDir(), "acpi")
	first, stderr := rtmr0(t, config, "--vcpus", "1-2", "--acpi-from-qemu", "--acpi-out", out)
	require.Len(t, first, 2)
	assert.Len(t, first[1].Hex, 96)
	assert.Len(t, first[2].Hex, 96)
	assert.NotEqual(t, first[1].Hex, first[2].Hex)
	assert.Contains(t, first[1].Note, "1 network interface under emulation")
	assert.Contains(t, first[1].Note, "is not proven")
	assert.Equal(t, 2, strings.Count(stderr, "starting "+qemu), "a start for each size: %s", stderr)
	assert.Contains(t, stderr, filepath.Join(out, "vcpus-2"))

	again, _ := rtmr0(t, config, "--vcpus", "1", "--acpi-from-qemu")
	assert.Equal(t, first[1], again[1], "the same machine has the same tables")
	kept, stderr := rtmr0(t, config, "--vcpus", "1-2", "--acpi", out)
	assert.Empty(t, stderr)
	for n, v := range kept {
		assert.Equal(t, first[n].Hex, v.Hex)
		assert.NotContains(t, v.Note, "emulation", "it is not known where they come from")
	}

	// Of a size whose tables are not there the others' value is not taken.
	only := filepath.Join(out, "vcpus-1")
	partly, stderr := rtmr0(t, config, "--vcpus", "1-2", "--acpi", only)
	require.Len(t, partly, 1)
	assert.Equal(t, first[1].Hex, partly[1].Hex)
	assert.Contains(t, stderr, "cloister: tdx.rtmr0 is not predicted: ")
	status, stdout, _ := cloister(t, "measure", "--config", config, "--tee", "tdx", "--vcpus", "1-2", "--acpi", only)
	require.Equal(t, exitOK, status)
	assert.Regexp(t, "\n  host +1 vCPU +"+first[1].Hex+"\n", stdout)
	assert.NotContains(t, stdout, "2 vCPUs")

	none, _ := rtmr0(t, config, "--vcpus", "1", "--acpi-from-qemu", "--nics", "0")
	two, _ := rtmr0(t, config, "--vcpus", "1", "--acpi-from-qemu", "--nics", "2")
	assert.NotEqual(t, first[1].Hex, none[1].Hex)
	assert.NotEqual(t, first[1].Hex, two[1].Hex)
	assert.NotEqual(t, none[1].Hex, two[1].Hex)

	status, stdout, stderr = cloister(t, "measure", "--config", config, "--tee", "tdx", "--acpi-from-qemu")
	require.Equal(t, exitOK, status, stderr)
	assert.Contains(t, stdout, "emulated")
	assert.Contains(t, stdout, first[1].Hex)
}

// Without a QEMU that starts there is an error, no value that is left out.
func TestACPIFromABrokenQEMU(t *testing.T) {
	config, _ := tdxNode(t)
	text, err := os.ReadFile(config)
	require.NoError(t, err)
	broken := filepath.Join(t.TempDir(), "qemu")
	require.NoError(t, os.WriteFile(broken, []byte("#!/bin/sh\necho out of order >&2\nexit 1\n"), 0o755))
	text = []byte(strings.Replace(string(text), os.Getenv("CLOISTER_TEST_QEMU"), broken, 1))
	require.NoError(t, os.WriteFile(config, text, 0o600))
	status, stdout, stderr := cloister(t, "measure", "--config", config, "--tee", "tdx", "--acpi-from-qemu")
	assert.Equal(t, exitNo, status)
	assert.Empty(t, stdout)
	assert.Contains(t, stderr, "tdx.rtmr0")
	assert.Contains(t, stderr, "out of order")
}

func TestACPIWrongUsage(t *testing.T) {
	n := newNode(t, "")
	for _, args := range [][]string{
		{"--tee", "tdx", "--acpi", "x", "--acpi-from-qemu"},
		{"--tee", "tdx", "--nics", "1"},
		{"--tee", "tdx", "--acpi-out", "x"},
		{"--tee", "tdx", "--acpi", "x", "--nics", "2"},
		{"--tee", "tdx", "--acpi-from-qemu", "--nics", "-1"},
		{"--tee", "tdx", "--acpi-from-qemu", "--nics", "9"},
		{"--tee", "tdx", "--acpi-from-qemu", "--nics", "many"},
		{"--tee", "snp", "--acpi-from-qemu"},
		{"--tee", "snp", "--acpi", "x"},
	} {
		status, stdout, stderr := cloister(t, append([]string{"measure", "--config", n.config}, args...)...)
		assert.Equal(t, exitUsage, status, "%v: %s", args, stderr)
		assert.Empty(t, stdout, "%v", args)
	}
}
