// SPDX-License-Identifier: Apache-2.0

package dryrun

import (
	"context"
	"fmt"
	"path/filepath"
	"time"

	"github.com/containerd/errdefs"

	"github.com/cloister-project/cloister/configs"
	"github.com/cloister-project/cloister/hypervisor"
	"github.com/cloister-project/cloister/tee/platform"
)

// Tables says where the ACPI tables come from that TDX measures in RTMR0. The zero value: nowhere.
type Tables struct {
	// Dir is a directory with the tables, or with one of them for each size (package tdx).
	Dir string
	// FromVMM has the node's VMM make them: the planned VM is started once for each number of CPUs, under emulation and
	// without TDX, up to the moment when the firmware takes the tables.
	FromVMM bool
	// NICs are the network interfaces of these VMs.
	NICs int
	// Out is a directory in which made tables are kept; empty: they are not.
	Out string
	// Progress is called with what is going on, for people. May be nil.
	Progress func(text string)
}

// tablesTimeout of one start: firmware takes its tables after a second or two, under emulation on a busy machine later.
const tablesTimeout = 5 * time.Minute

func (t Tables) options(cfg *configs.Config) platform.Options {
	o := platform.Options{ACPI: t.Dir}
	if t.FromVMM {
		o.Tables = (&tableMaker{tables: t, cfg: cfg, turn: make(chan struct{}, 1)}).make
	}
	return o
}

// tableMaker makes the ACPI tables of planned VMs.
type tableMaker struct {
	tables Tables
	cfg    *configs.Config
	// turn is held (one element) while a VMM runs: one at a time. driver is written under it.
	turn   chan struct{}
	driver hypervisor.Driver
}

// make is tdx.Config.Tables.
func (m *tableMaker) make(ctx context.Context, doc hypervisor.Document) (tables hypervisor.ACPITables, how string, err error) {
	select {
	case m.turn <- struct{}{}:
		defer func() { <-m.turn }()
	case <-ctx.Done():
		return tables, "", ctx.Err()
	}
	if m.driver == nil {
		plan, err := planHost(m.cfg)
		if err != nil {
			return tables, "", err
		}
		m.driver = plan.Driver()
	}
	maker, ok := m.driver.(hypervisor.TableMaker)
	if !ok {
		return tables, "", fmt.Errorf("the VMM %q (hypervisor.kind) makes no ACPI tables for TDX: %w", m.driver.Kind(), errdefs.ErrNotImplemented)
	}
	binary, err := m.driver.Binary()
	if err != nil {
		return tables, "", err
	}
	// A plan has no interfaces; their addresses are in no table.
	doc.NICs = nil
	for i := range m.tables.NICs {
		doc.NICs = append(doc.NICs, hypervisor.NIC{ID: fmt.Sprintf("net%d", i), MAC: fmt.Sprintf("02:00:00:00:00:%02x", i+1)})
	}
	m.say("starting %s for the ACPI tables of a VM with %s and %s, emulated",
		binary, plural(doc.CPU.Count, "vCPU"), plural(m.tables.NICs, "network interface"))
	started := time.Now()
	timeout, cancel := context.WithTimeoutCause(ctx, tablesTimeout, fmt.Errorf("nothing for %v: %w", tablesTimeout, context.DeadlineExceeded))
	defer cancel()
	if tables, how, err = maker.ACPITables(timeout, doc); err != nil {
		return tables, "", err
	}
	kept := ""
	if m.tables.Out != "" {
		dir := filepath.Join(m.tables.Out, hypervisor.ACPIDirectory(doc.CPU.Count))
		if err := tables.Write(dir); err != nil {
			return tables, "", fmt.Errorf("keep the ACPI tables: %w", err)
		}
		kept = ", kept in " + dir
	}
	m.say("got them after %.1f s%s", time.Since(started).Seconds(), kept)
	return tables, how, nil
}

func (m *tableMaker) say(format string, a ...any) {
	if m.tables.Progress != nil {
		m.tables.Progress(fmt.Sprintf(format, a...))
	}
}
