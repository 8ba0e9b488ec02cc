// SPDX-License-Identifier: Apache-2.0

package main

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestParseJUnit(t *testing.T) {
	results, err := parseJUnit([]byte(`<?xml version="1.0" encoding="UTF-8"?>
<testsuites><testsuite name="CRI validation">
<testcase name="[BeforeSuite]" status="passed" time="0.1"></testcase>
<testcase name="[It] [k8s.io] Container starts [Conformance]" status="passed" time="1.5"></testcase>
<testcase name="[It] [k8s.io] Container &lt;pod&gt;" status="failed" time="2"><failure message="expected 1" type="failed">here
and there</failure></testcase>
<testcase name="[It] not selected" status="skipped" time="0"><skipped message="skipped"></skipped></testcase>
<testcase name="[It] SELinux" status="skipped" time="0"><skipped message="skipped - no SELinux here"></skipped></testcase>
<testcase name="[It] slow" status="timedout" time="9"><error message="it took too long"></error></testcase>
<testcase name="[AfterSuite]" status="panicked" time="9"><error message="oh"></error></testcase>
</testsuite></testsuites>`))
	require.NoError(t, err)
	assert.Equal(t, []Result{
		{Spec: "[k8s.io] Container starts [Conformance]", State: Passed, Seconds: 1.5},
		{Spec: "[k8s.io] Container <pod>", State: Failed, Seconds: 2, Reason: "expected 1\nhere\nand there"},
		{Spec: "SELinux", State: Skipped, Reason: "no SELinux here"},
		{Spec: "slow", State: Failed, Seconds: 9, Reason: "it took too long"},
		{Spec: "[AfterSuite]", State: Failed, Seconds: 9, Reason: "oh"},
	}, results)

	_, err = parseJUnit([]byte("<testsuites>"))
	assert.Error(t, err)
}

func TestParseGo(t *testing.T) {
	for name, c := range map[string]struct {
		output string
		want   []Result
	}{
		"passed": {"=== RUN   TestA\n--- PASS: TestA (0.50s)\nPASS\n", []Result{{Spec: "TestA", State: Passed, Seconds: 0.5}}},
		"skipped": {"=== RUN   TestA\n    a_test.go:1: no criu\n--- SKIP: TestA (0.00s)\n", []Result{{Spec: "TestA", State: Skipped,
			Reason: "=== RUN   TestA\n    a_test.go:1: no criu\n--- SKIP: TestA (0.00s)"}}},
		"subtests": {"--- FAIL: TestA (2.00s)\n    --- PASS: TestA/one (1.00s)\n    --- FAIL: TestA/two (1.00s)\n", []Result{
			{Spec: "TestA/one", State: Passed, Seconds: 1},
			{Spec: "TestA/two", State: Failed, Seconds: 1,
				Reason: "--- FAIL: TestA (2.00s)\n    --- PASS: TestA/one (1.00s)\n    --- FAIL: TestA/two (1.00s)"}}},
		"failed beside its subtests": {"--- FAIL: TestA (2.00s)\n    --- PASS: TestA/one (1.00s)\n", []Result{
			{Spec: "TestA", State: Failed, Seconds: 2, Reason: "--- FAIL: TestA (2.00s)\n    --- PASS: TestA/one (1.00s)"},
			{Spec: "TestA/one", State: Passed, Seconds: 1}}},
		"killed": {"=== RUN   TestA\npanic: test timed out\n", []Result{{Spec: "TestA", State: Failed,
			Reason: "=== RUN   TestA\npanic: test timed out"}}},
		"nothing": {"", []Result{{Spec: "TestA", State: Failed}}},
		"another's name in the log": {"time=x msg=\"--- PASS: TestA (0.1s)\"\n", []Result{{Spec: "TestA", State: Failed,
			Reason: "time=x msg=\"--- PASS: TestA (0.1s)\""}}},
	} {
		t.Run(name, func(t *testing.T) { assert.Equal(t, c.want, parseGo("TestA", c.output)) })
	}
}

func TestCompare(t *testing.T) {
	baseline := &Report{Suites: []Suite{{Name: "critest", Results: []Result{
		{Spec: "a", State: Passed}, {Spec: "group b", State: Passed}, {Spec: "c", State: Failed, Reason: "no image"},
		{Spec: "d", State: Passed}, {Spec: "e", State: Passed},
	}}}}
	ours := &Report{Suites: []Suite{{Name: "critest-classic", Results: []Result{
		{Spec: "a", State: Passed}, {Spec: "group b", State: Failed}, {Spec: "c", State: Failed}, {Spec: "d", State: Skipped},
	}}}}
	limits := []limit{{"critest", "b", "a VM"}, {"critest", "a", "a VM"}, {"critest-classic", "e", "a VM"}, {"client", "x", "did not run"}}

	c := compare(baseline, ours, limits)
	assert.Equal(t, []count{{suite: "critest-classic", specs: 5, runc: 4, cloister: 1, both: 1, except: 3}}, c.counts)
	assert.Equal(t, []limit{{"critest", "a", "a VM"}}, c.passing)
	err := c.fault()
	assert.ErrorContains(t, err, "critest-classic: d passes with runc and not with Cloister")
	assert.ErrorContains(t, err, "critest: a passes, or is not there")
	assert.NotContains(t, err.Error(), "group b passes")
	assert.NotContains(t, err.Error(), ": e passes")
	assert.Contains(t, c.text(), "| critest-classic | d | skipped | **not explained** |")
	assert.Contains(t, c.text(), "| critest-classic | c | failed | no image |")
}

func TestReadLimits(t *testing.T) {
	path := filepath.Join(t.TempDir(), "limits.md")
	write := func(text string) { require.NoError(t, os.WriteFile(path, []byte(text), 0o600)) }
	write("# Limits\n\n| a | b | c |\n\n" + limitsHeading + "\n\nWords.\n\n| suite | spec | why |\n|---|---|---|\n" +
		"| `critest` | `x [y]` | It asks for the host. |\n\n## Next\n\n| d | e | f |\n")
	limits, err := readLimits(path)
	require.NoError(t, err)
	assert.Equal(t, []limit{{"critest", "x [y]", "It asks for the host."}}, limits)

	write(limitsHeading + "\n| critest | two cells |\n")
	_, err = readLimits(path)
	assert.ErrorContains(t, err, "is not | suite | spec | why |")
}

func TestWriteDocs(t *testing.T) {
	path := filepath.Join(t.TempDir(), "conformance.md")
	c := compare(&Report{Date: "2026-01-02"}, &Report{Date: "2026-01-03", Versions: map[string]string{"runc": "1"}}, nil)
	require.NoError(t, os.WriteFile(path, []byte("before\n"+tableBegin+"old\n"+tableEnd+"after\n"), 0o600))
	require.NoError(t, writeDocs(path, c))
	text, err := os.ReadFile(path)
	require.NoError(t, err)
	assert.Contains(t, string(text), "before\n"+tableBegin+"Run on 2026-01-03 (Cloister) and 2026-01-02 (runc)")
	assert.Contains(t, string(text), tableEnd+"after\n")
	assert.NotContains(t, string(text), "old")

	require.NoError(t, os.WriteFile(path, []byte("nothing"), 0o600))
	assert.ErrorContains(t, writeDocs(path, c), "lacks the lines")
	c.ours.Focus = "x"
	assert.ErrorContains(t, writeDocs(path, c), "-focus")
}
