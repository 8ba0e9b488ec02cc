// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestEvidence(t *testing.T) {
	dir := t.TempDir()
	write := func(name string, content []byte) string {
		path := filepath.Join(dir, name)
		require.NoError(t, os.WriteFile(path, content, 0o600))
		return path
	}
	raw := make([]byte, 0x4a0) // ATTESTATION_REPORT, AMD 56860: version, policy, measurement
	binary.LittleEndian.PutUint32(raw, 2)
	binary.LittleEndian.PutUint64(raw[8:], 0x30000)
	copy(raw[0x90:], bytes.Repeat([]byte{0xbb}, 48))
	report := write("report", raw)
	measured := func(digest string) []byte {
		rest := fmt.Sprintf(`{"name":"snp.policy","hex":"0000030000000000"},{"name":"snp.host_data","hex":"%s"}`, strings.Repeat("00", 32))
		return fmt.Appendf(nil, `{"reference_values":[{"platform":"snp","vcpus":1,"values":[{"name":"snp.launch_digest","hex":"00"},%s]},
			{"platform":"snp","vcpus":2,"cpu_model":"M","values":[{"name":"snp.launch_digest","hex":"%s"},%s]}]}`, rest, digest, rest)
	}
	good := write("good.json", measured(strings.Repeat("bb", 48)))

	status, stdout, stderr := cloister(t, "evidence", report, "--reference", good)
	require.Equal(t, exitOK, status, stderr)
	assert.Contains(t, stdout, "NOT VERIFIED")
	assert.Contains(t, stdout, "snp.launch_digest (MEASUREMENT)\n  "+strings.Repeat("bb", 48))
	assert.Contains(t, stdout, "The values are those of a VM with 2 vCPUs of M.")
	status, stdout, stderr = cloister(t, "evidence", report, "--json", "--reference", good)
	require.Equal(t, exitOK, status, stderr)
	assert.Contains(t, stdout, `"vcpus": 2`)
	status, stdout, _ = cloister(t, "evidence", report, "--json")
	require.Equal(t, exitOK, status)
	assert.Contains(t, stdout, `"verified": false`)

	for name, reference := range map[string][]byte{
		"predicted was bc":             measured(strings.Repeat("bc", 48)),
		"has no reference values":      []byte("{}"),
		"is not what cloister measure": []byte("x"),
		"snp.host_data is missing": []byte(`{"reference_values":[{"platform":"snp","values":[` +
			`{"name":"snp.launch_digest","hex":"` + strings.Repeat("bb", 48) + `"},{"name":"snp.policy","hex":"0000030000000000"}]}]}`),
	} {
		status, _, stderr := cloister(t, "evidence", report, "--reference", write("bad.json", reference))
		assert.Equal(t, exitNo, status)
		assert.Contains(t, stderr, name)
	}
	status, _, stderr = cloister(t, "evidence", write("other", []byte("hello")))
	assert.Equal(t, exitNo, status)
	assert.Contains(t, stderr, "neither an SEV-SNP attestation report nor a TDX quote")
	status, _, _ = cloister(t, "evidence")
	assert.Equal(t, exitUsage, status)
}
