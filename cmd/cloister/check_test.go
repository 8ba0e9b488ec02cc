// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/cloister-project/cloister/tee"
)

// What a report looks like, and what it says of nodes that differ.
func TestReports(t *testing.T) {
	ok := finding{What: "configuration", Result: good}
	gone := finding{What: "/dev/sev", Result: bad, Detail: "not there", Fix: "load the module ccp"}
	aside := finding{What: "free ASIDs", Result: note, Detail: "not counted"}
	snp := platformCheck{Platform: tee.SNP, Description: tee.SNP.Describe(), Configured: true, Findings: []finding{gone, aside}}
	none := platformCheck{Platform: tee.None, Description: tee.None.Describe(), Usable: true, Findings: []finding{ok}}
	for _, tc := range []struct {
		name   string
		report checkReport
		want   string
	}{
		{"one", checkReport{Node: []finding{ok}, Platforms: []platformCheck{snp}}, `ok       configuration               
MISSING  /dev/sev                    not there
                                       fix: load the module ccp
note     free ASIDs                  not counted
`},
		{"all", checkReport{Node: []finding{ok}, Platforms: []platformCheck{none, snp}}, `ok       configuration               

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
			require.NoError(t, tc.report.print(&out))
			assert.Equal(t, tc.want, out.String())
			assert.EqualError(t, tc.report.verdict(), `1 of 3 checks failed: pods of platform "snp" will not start`)
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
	var r checkReport
	require.NoError(t, json.Unmarshal([]byte(stdout), &r))
	assert.False(t, r.Usable)
	assert.Len(t, r.Node, 2)
}

// A fake node has neither the hardware nor a QEMU that runs: that must show, with a fix for each thing.
func TestCheckOfANodeThatLacksAll(t *testing.T) {
	n := newNode(t, "")
	for _, name := range tee.Names() {
		status, stdout, _ := cloister(t, "check", "--config", n.config, "--tee", string(name), "--json")
		var r checkReport
		require.NoError(t, json.Unmarshal([]byte(stdout), &r))
		require.Len(t, r.Platforms, 1)
		p := r.Platforms[0]
		assert.Equal(t, name, p.Platform)
		assert.Equal(t, name.Describe(), p.Description)
		assert.Equal(t, exitNo, status)
		assert.False(t, p.Usable, "QEMU does not run")
		assert.Positive(t, missing(p.Findings))
		for _, f := range p.Findings {
			assert.NotContains(t, f.Detail, "\n")
			if f.Result == bad {
				assert.NotEmpty(t, f.Fix, "%+v", f)
			}
		}
	}
}

func TestCheckAll(t *testing.T) {
	n := newNode(t, "platform = 'sample'")
	status, stdout, _ := cloister(t, "check", "--config", n.config, "--tee", "all", "--json")
	assert.Equal(t, exitNo, status)
	var r checkReport
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

// A configuration that every pod is refused for must not look usable.
func TestCheckLaunch(t *testing.T) {
	n := newNode(t, "initdata = '/somewhere.toml'")
	cfg := n.load(t, "none")
	cfg.TEE.Initdata = n.write(t, "initdata.toml", testInitdata)
	f := checkLaunch(context.Background(), cfg)
	assert.Equal(t, bad, f.Result)
	assert.Contains(t, f.Detail, "initdata is given")
	assert.NotEmpty(t, f.Fix)

	f = checkLaunch(context.Background(), n.load(t, "snp"))
	assert.Equal(t, bad, f.Result)
	assert.Contains(t, f.Detail, "/somewhere.toml")

	f = checkLaunch(context.Background(), newNode(t, "").load(t, "snp"))
	assert.Equal(t, bad, f.Result, "the node's QEMU does not run")
	assert.Contains(t, f.Fix, "QEMU")
}

func TestOneLine(t *testing.T) {
	assert.Equal(t, "a; b c", oneLine("a\nb   c"))
	assert.False(t, strings.Contains(oneLine("\n\n"), "\n"))
}
