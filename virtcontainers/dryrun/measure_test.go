// SPDX-License-Identifier: Apache-2.0

package dryrun

import (
	"context"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/cloister-project/cloister/hypervisor"
	"github.com/cloister-project/cloister/tee"
	"github.com/cloister-project/cloister/virtcontainers/dryrun/manifest"
)

func TestMeasureVariants(t *testing.T) {
	cfg := load(t, newNode(t, ""), "snp")
	m, err := Measure(t.Context(), cfg, manifest.Example(), Variants{VCPUs: []int{1, 2, 8, 3}, Models: []string{"EPYC-Milan", "EPYC-v4"}})
	require.NoError(t, err)
	assert.False(t, m.AnyCPUs)
	assert.True(t, m.Predicted)
	var got []any
	for _, r := range m.ReferenceValues {
		got = append(got, r.CPUModel, r.VCPUs)
	}
	assert.Equal(t, []any{
		"EPYC-Milan", 1, "EPYC-Milan", 2, "EPYC-Milan", 8, "EPYC-Milan", 3, "EPYC-v4", 1, "EPYC-v4", 2, "EPYC-v4", 8, "EPYC-v4", 3,
	}, got)

	own, err := Measure(t.Context(), cfg, parse(t, "kind: Pod\nspec: {containers: [{resources: {limits: {cpu: 1500m}}}]}"), Variants{})
	require.NoError(t, err)
	require.Len(t, own.ReferenceValues, 1)
	assert.Equal(t, 2, own.ReferenceValues[0].VCPUs)
	assert.Equal(t, m.ReferenceValues[5].Values, own.ReferenceValues[0].Values, "the default model, two CPUs")
}

func TestMeasureRefuses(t *testing.T) {
	config := newNode(t, "")
	for _, name := range []string{"none", "sample"} {
		_, err := Measure(t.Context(), load(t, config, name), manifest.Example(), Variants{})
		require.ErrorContains(t, err, "no hardware measures it")
	}
	many := Variants{VCPUs: make([]int, MaxVariants), Models: []string{"a", "b"}}
	_, err := Measure(t.Context(), load(t, config, "snp"), manifest.Example(), many)
	require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
	require.ErrorContains(t, err, "8192 variants")
	_, err = Measure(t.Context(), load(t, config, "snp"), manifest.Example(), Variants{Models: []string{"host"}})
	require.ErrorContains(t, err, "depends on the machine")
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err = Measure(ctx, load(t, config, "snp"), manifest.Example(), Variants{})
	require.ErrorIs(t, err, context.Canceled)
}

func TestUnpredictedOnce(t *testing.T) {
	a, b, c := tee.Unpredicted{Name: "r0", Reason: "x"}, tee.Unpredicted{Name: "r0", Reason: "y"}, tee.Unpredicted{Name: "r1", Reason: "x"}
	m := Measurement{ReferenceValues: []tee.ReferenceValues{
		{Unpredicted: []tee.Unpredicted{a, c}}, {}, {Unpredicted: []tee.Unpredicted{a, b}},
	}}
	assert.Equal(t, []tee.Unpredicted{a, c, b}, m.Unpredicted())
}

func TestRuns(t *testing.T) {
	counts := []int{1, 2, 3, 8, 4, 5}
	assert.Equal(t, [][]int{{1, 2, 3}, {8}, {4, 5}}, runs(counts, true))
	assert.Equal(t, [][]int{{1}, {2}, {3}, {8}, {4}, {5}}, runs(counts, false))
	assert.Equal(t, [][]int{{podsOwn}}, runs([]int{podsOwn}, true))
	assert.Equal(t, []int{1, 2, 3, 8, 4, 5}, counts)
}

// tablesDriver makes tables of nothing.
type tablesDriver struct {
	hypervisor.Driver
	got []hypervisor.Document
}

func (*tablesDriver) Binary() (string, error) { return "/vmm", nil }

func (d *tablesDriver) ACPITables(_ context.Context, doc hypervisor.Document) (hypervisor.ACPITables, string, error) {
	d.got = append(d.got, doc)
	return hypervisor.ACPITables{Loader: []byte("l"), RSDP: []byte("r"), Tables: []byte("t")}, "made up", nil
}

func (fakeDriver) Kind() string { return "fake" }

func TestTablesOfAVMM(t *testing.T) {
	driver, out := &tablesDriver{}, t.TempDir()
	var said []string
	tables := Tables{FromVMM: true, NICs: 2, Out: out, Progress: func(text string) { said = append(said, text) }}
	m := &tableMaker{tables: tables, turn: make(chan struct{}, 1), driver: driver}
	doc := hypervisor.Document{CPU: hypervisor.CPU{Count: 3}, NICs: []hypervisor.NIC{{ID: "x"}}}
	got, how, err := m.make(t.Context(), doc)
	require.NoError(t, err)
	assert.Equal(t, "made up", how)
	assert.Equal(t, []byte("r"), got.RSDP)
	require.Len(t, driver.got, 1)
	assert.Len(t, driver.got[0].NICs, 2)
	assert.Equal(t, "x", doc.NICs[0].ID)
	assert.FileExists(t, out+"/vcpus-3/table-loader")
	require.Len(t, said, 2)
	assert.Equal(t, "starting /vmm for the ACPI tables of a VM with 3 vCPUs and 2 network interfaces, emulated", said[0])
	assert.Contains(t, said[1], "kept in "+out)

	m.tables.Out, m.tables.Progress = "/dev/null", nil
	_, _, err = m.make(t.Context(), doc)
	require.ErrorContains(t, err, "keep the ACPI tables")
	m.driver = fakeDriver{}
	_, _, err = m.make(t.Context(), doc)
	require.ErrorIs(t, err, errdefs.ErrNotImplemented)
	m.turn <- struct{}{} // another is at it
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, _, err = m.make(ctx, doc)
	require.ErrorIs(t, err, context.Canceled)
}
