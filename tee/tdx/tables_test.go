// SPDX-License-Identifier: Apache-2.0

package tdx

import (
	"context"
	"errors"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"

	"github.com/cloister-project/cloister/hypervisor"
	"github.com/cloister-project/cloister/tee"
)

// measureTables measures with a maker of tables, and tells for how many CPUs it was asked each time.
func measureTables(t *testing.T, drivers string, vcpus int, tables *ACPI, fault error) (r *tee.ReferenceValues, asked []int, err error) {
	t.Helper()
	cfg := testConfig(t, drivers)
	cfg.Tables = func(_ context.Context, doc hypervisor.Document) (hypervisor.ACPITables, string, error) {
		asked = append(asked, doc.CPU.Count)
		if tables == nil {
			return hypervisor.ACPITables{}, "", fault
		}
		return hypervisor.ACPITables(*tables), "those of a test", fault
	}
	p := mustNew(t, cfg)
	doc := testDocument(t)
	doc.CPU.Count = vcpus
	require.NoError(t, p.Prepare(context.Background(), &doc, tee.Inputs{}))
	r, err = p.Measure(context.Background(), doc)
	return r, asked, err
}

func TestTablesMade(t *testing.T) {
	r, asked, err := measureTables(t, driversOld, 3, testACPI(3), nil)
	require.NoError(t, err)
	require.Equal(t, []int{3}, asked)
	got := values(t, r)["tdx.rtmr0"]
	require.Len(t, got.Hex, 2*DigestSize)
	require.Equal(t, noteRTMR0+"those of a test", got.Note)

	// The same tables from directories, one for each size.
	cfg := testConfig(t, driversOld)
	cfg.ACPI = t.TempDir()
	for _, n := range []int{1, 3} {
		require.NoError(t, (*hypervisor.ACPITables)(testACPI(n)).Write(filepath.Join(cfg.ACPI, hypervisor.ACPIDirectory(n))))
	}
	p := mustNew(t, cfg)
	doc := testDocument(t)
	doc.CPU.Count = 3
	require.NoError(t, p.Prepare(context.Background(), &doc, tee.Inputs{}))
	given, err := p.Measure(context.Background(), doc)
	require.NoError(t, err)
	require.Equal(t, got.Hex, values(t, given)["tdx.rtmr0"].Hex)
	require.Equal(t, noteRTMR0+noteGiven, values(t, given)["tdx.rtmr0"].Note)
}

// Where RTMR0 cannot be predicted anyway, nothing is started for it.
func TestTablesNotMadeInVain(t *testing.T) {
	for name, drivers := range map[string]string{"newer": driversNew, "no driver": driversPlain, "another kind": ""} {
		r, asked, err := measureTables(t, drivers, 2, testACPI(2), nil)
		require.NoError(t, err, name)
		require.Empty(t, asked, name)
		require.NotContains(t, values(t, r), "tdx.rtmr0", name)
		require.Contains(t, unpredicted(r), "tdx.rtmr0", name)
	}
}

// A failure to make tables that somebody asked for is never shown as a register that cannot be predicted.
func TestTablesThatCannotBeMade(t *testing.T) {
	for _, kind := range []error{errdefs.ErrNotImplemented, errdefs.ErrNotFound, errors.New("other")} {
		_, asked, err := measureTables(t, driversOld, 2, nil, kind)
		require.ErrorIs(t, err, kind)
		require.ErrorContains(t, err, "tdx.rtmr0")
		require.Len(t, asked, 1)
	}
	_, _, err := measureTables(t, driversOld, 2, testACPI(1), nil)
	require.ErrorContains(t, err, "with 1 CPUs, this one has 2")
	bad := testACPI(2)
	bad.Loader = bad.Loader[1:]
	_, _, err = measureTables(t, driversOld, 2, bad, nil)
	require.ErrorContains(t, err, "table-loader")
}

// unpredicted are the registers that have no value, with the reasons.
func unpredicted(r *tee.ReferenceValues) map[string]string {
	all := make(map[string]string)
	for _, u := range r.Unpredicted {
		all[u.Name] = u.Reason
	}
	return all
}
