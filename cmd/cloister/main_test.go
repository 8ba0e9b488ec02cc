// SPDX-License-Identifier: Apache-2.0

package main

import (
	"testing"

	"github.com/stretchr/testify/assert"

	"github.com/cloister-project/cloister/configs"
)

// Scripts tell a wrong command line from an answer "no" by the exit status.
func TestWrongUsage(t *testing.T) {
	for _, args := range [][]string{
		{"nonsense"},
		{"frob"},
		{"help", "frob"},
		{"help", "image", "frob"},
		{"help", "check", "extra"},
		{"check", "--tee", ""},
		{"check", "--config", ""},
		{"check", "--tee="},
		{"plan", "--file", ""},
		{"plan", "-f", "", "--json"},
		{"plan", "--tee", ""},
		{"measure", "--vcpus", ""},
		{"measure", "--cpu-model", ""},
		{"measure", "--firmware", ""},
		{"measure", "--tee", "tdx", "--acpi", ""},
		{"config", "--tee", ""},
		{"image", "se", "build", "--kernel", "k", "--stubs", "s", "--output", "/nowhere/o", "-k", "h", "--no-verify", "--initrd", ""},
		{"--nonsense"},
		{"check", "snp"},
		{"check", "--tee", "sev"},
		{"check", "--tee"},
		{"check", "--json=perhaps"},
		{"plan", "pod.yaml"},
		{"plan", "--tee", "all"},
		{"measure", "--tee", "SNP"},
		{"measure", "--vcpus", "0"},
		{"measure", "--vcpus", "4-2"},
		{"measure", "--vcpus", "1-"},
		{"measure", "--vcpus", "1,,2"},
		{"measure", "--vcpus", "1-100000"},
		{"measure", "--vcpus", "one"},
		{"measure", "--cpu-model", "EPYC,,Milan"},
		{"measure", "--cpu-model", "EPYC -drive"},
		{"config", "--tee", "none"},
		{"config", "--tee", "../cloister"},
		{"config", "extra"},
		{"image", "nonsense"},
		{"image", "se", "nonsense"},
		{"image", "se", "inspect"},
		{"image", "se", "inspect", "a", "b"},
		{"image", "se", "build"},
		{"image", "se", "build", "--kernel", "k", "--stubs", "s"},
		{"image", "se", "build", "--kernel", "k", "--stubs", "s", "--output", "/nowhere/o"},
		{"image", "se", "build", "--kernel", "k", "--stubs", "s", "--output", "/nowhere/o", "-k", "h"},
		{"image", "se", "build", "--kernel", "k", "--stubs", "s", "--output", "/nowhere/o", "-k", "h", "--no-verify", "--crl", "c"},
		{"image", "se", "attest-request", "-k", "h"},
	} {
		status, stdout, stderr := cloister(t, args...)
		assert.Equal(t, exitUsage, status, "%v: %s", args, stderr)
		assert.Contains(t, stderr, "cloister: ", "%v", args)
		assert.Empty(t, stdout, "%v", args)
	}
}

func TestHelp(t *testing.T) {
	for _, args := range [][]string{
		{"help"}, {"help", "check"}, {"help", "image", "se"}, {"help", "image", "se", "build"}, {"help", "help"}, {"--help"}, {},
		{"check", "--help"}, {"plan", "--help"}, {"measure", "--help"}, {"image"}, {"image", "se"},
		{"image", "se", "build", "--help"}, {"image", "se", "inspect", "--help"}, {"image", "se", "attest-request", "--help"}, {"--version"},
	} {
		status, stdout, stderr := cloister(t, args...)
		assert.Equal(t, exitOK, status, "%v", args)
		assert.NotEmpty(t, stdout, "%v", args)
		assert.Empty(t, stderr, "%v", args)
	}
}

// A command that does not exist is said to be so, whoever is asked.
func TestUnknownCommands(t *testing.T) {
	for _, args := range [][]string{{"frob"}, {"help", "frob"}, {"help", "image", "frob"}} {
		_, _, stderr := cloister(t, args...)
		assert.Contains(t, stderr, "frob", "%v", args)
	}
	_, help, _ := cloister(t, "help", "image", "se", "build")
	_, same, _ := cloister(t, "image", "se", "build", "--help")
	assert.Equal(t, same, help)
}

func TestConfig(t *testing.T) {
	status, stdout, _ := cloister(t, "config")
	assert.Equal(t, exitOK, status)
	assert.Equal(t, string(configs.Base()), stdout)
	status, stdout, _ = cloister(t, "config", "--tee", "snp")
	assert.Equal(t, exitOK, status)
	assert.Contains(t, stdout, `platform = "snp"`)
}
