// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"encoding/json"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/cloister-project/cloister/tee"
	"github.com/cloister-project/cloister/virtcontainers/dryrun"
)

// What a report looks like, and what it says of nodes that differ.
func TestReports(t *testing.T) {
	ok := dryrun.Finding{What: "configuration", Result: dryrun.Good}
	gone := dryrun.Finding{What: "/dev/sev", Result: dryrun.Bad, Detail: "not there", Fix: "load the module ccp"}
	aside := dryrun.Finding{What: "free ASIDs", Result: dryrun.Note, Detail: "not counted"}
	snp := dryrun.PlatformCheck{Platform: tee.SNP, Description: tee.SNP.Describe(), Configured: true, Findings: []dryrun.Finding{gone, aside}}
	none := dryrun.PlatformCheck{Platform: tee.None, Description: tee.None.Describe(), Usable: true, Findings: []dryrun.Finding{ok}}
	for _, tc := range []struct {
		name   string
		report dryrun.Report
		want   string
	}{
		{"one", dryrun.Report{Node: []dryrun.Finding{ok}, Platforms: []dryrun.PlatformCheck{snp}}, `ok       configuration               
MISSING  /dev/sev                    not there
                                       fix: load the module ccp
note     free ASIDs                  not counted
`},
		{"all", dryrun.Report{Node: []dryrun.Finding{ok}, Platforms: []dryrun.PlatformCheck{none, snp}}, `ok       configuration               

none (the host can read this VM's memory): usable
ok       configuration               

snp (AMD SEV-SNP), configured: NOT usable, 1 missing
MISSING  /dev/sev                    not there
                                       fix: load the module ccp
note     free ASIDs                  not counted
`},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var out bytes.Buffer
			require.NoError(t, printReport(&out, tc.report))
			assert.Equal(t, tc.want, out.String())
			assert.EqualError(t, verdict(tc.report), `1 of 3 checks failed: pods of platform "snp" will not start`)
		})
	}
}

func TestCheckOfABadConfiguration(t *testing.T) {
	n := newNode(t, "nonsense = 1\n[log]\nlevel = 'loud'")
	status, stdout, stderr := cloister(t, "check", "--config", n.config)
	assert.Equal(t, exitNo, status)
	assert.Contains(t, stdout, "tee.nonsense: is not a key")
	assert.Contains(t, stdout, "log.level")
	assert.Contains(t, stderr, "2 of 2 checks failed: pods will not start")

	status, stdout, _ = cloister(t, "check", "--config", n.config, "--json")
	assert.Equal(t, exitNo, status)
	var r dryrun.Report
	require.NoError(t, json.Unmarshal([]byte(stdout), &r))
	assert.False(t, r.Usable)
	assert.Len(t, r.Node, 2)
}

// A fake node has neither the hardware nor a QEMU that runs: that must show, with a fix for each thing.
func TestCheckOfANodeThatLacksAll(t *testing.T) {
	n := newNode(t, "")
	for _, name := range tee.Names() {
		status, stdout, _ := cloister(t, "check", "--config", n.config, "--tee", string(name), "--json")
		var r dryrun.Report
		require.NoError(t, json.Unmarshal([]byte(stdout), &r))
		require.Len(t, r.Platforms, 1)
		p := r.Platforms[0]
		assert.Equal(t, name, p.Platform)
		assert.Equal(t, name.Describe(), p.Description)
		assert.Equal(t, exitNo, status)
		assert.False(t, p.Usable, "QEMU does not run")
		assert.Positive(t, dryrun.Missing(p.Findings))
		for _, f := range p.Findings {
			assert.NotContains(t, f.Detail, "\n")
			if f.Result == dryrun.Bad {
				assert.NotEmpty(t, f.Fix, "%+v", f)
			}
		}
	}
}

func TestCheckAll(t *testing.T) {
	n := newNode(t, "platform = 'sample'")
	status, stdout, _ := cloister(t, "check", "--config", n.config, "--tee", "all", "--json")
	assert.Equal(t, exitNo, status)
	var r dryrun.Report
	require.NoError(t, json.Unmarshal([]byte(stdout), &r))
	var names []tee.Name
	for _, p := range r.Platforms {
		names = append(names, p.Platform)
		assert.Equal(t, p.Platform == tee.Sample, p.Configured)
		if !p.Platform.Protected() {
			assert.NotContains(t, p.Description, "AMD")
		}
	}
	assert.Equal(t, tee.Names(), names)

	_, stdout, _ = cloister(t, "check", "--config", n.config, "--tee", "all")
	assert.Contains(t, stdout, "sample (NO PROTECTION")
	assert.Contains(t, stdout, ", configured: NOT usable")
	// What contradicts the platform is told, and the host is looked at all the same.
	assert.Contains(t, stdout, "hypervisor.arch: guests are of the architecture amd64, and platform \"se\" is of s390x")
}
