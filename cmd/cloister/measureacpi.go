// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"io"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"

	"github.com/cloister-project/cloister/configs"
	"github.com/cloister-project/cloister/hypervisor"
	"github.com/cloister-project/cloister/hypervisor/qemu"
	"github.com/cloister-project/cloister/tee"
	"github.com/cloister-project/cloister/tee/platform"
	"github.com/cloister-project/cloister/tee/tdx"
)

const (
	// maxPodNICs is what a VM has places for.
	maxPodNICs = 8
	// acpiTimeout of one start: firmware takes its tables after a second or two, under emulation on a busy machine later.
	acpiTimeout = 5 * time.Minute
)

const acpiHelp = "RTMR0 of TDX holds the ACPI tables that QEMU makes for the VM. --acpi-from-qemu has this machine's QEMU make them: it\n" +
	"starts the planned VM once for each number of CPUs, under emulation and without TDX, up to the moment when the firmware\n" +
	"takes the tables. QEMU, firmware and --nics must be those of the nodes. That QEMU makes the same tables for a real TD\n" +
	"under KVM is not proven. Of firmware whose further events are not known RTMR0 is left out, and no QEMU is started.\n\n"

// acpiFlags say where the ACPI tables of TDX's RTMR0 come from.
type acpiFlags struct {
	dir, out string
	fromQEMU bool
	nics     int
}

func (f *acpiFlags) add(cmd *cobra.Command) {
	cmd.Flags().StringVar(&f.dir, "acpi", "", "tdx: folder with the VM's ACPI blobs table-loader, rsdp and tables, for RTMR0, or with a folder vcpus-N of them for each size")
	cmd.Flags().BoolVar(&f.fromQEMU, "acpi-from-qemu", false, "tdx: get the ACPI blobs from this machine's QEMU, under emulation")
	cmd.Flags().IntVar(&f.nics, "nics", 1, "network interfaces of the pod, with --acpi-from-qemu")
	cmd.Flags().StringVar(&f.out, "acpi-out", "", "keep the blobs of --acpi-from-qemu in this folder, for --acpi")
}

// options checks the flags and turns them into the platform's.
func (f *acpiFlags) options(cmd *cobra.Command, cfg *configs.Config) (o platform.Options, err error) {
	switch {
	case f.dir != "" && f.fromQEMU:
		return o, usage("--acpi and --acpi-from-qemu: the tables come from one of them")
	case (f.dir != "" || f.fromQEMU) && cfg.TEE.Platform != string(tee.TDX):
		return o, usage("--acpi and --acpi-from-qemu are for the platform tdx; this is %q", cfg.TEE.Platform)
	case !f.fromQEMU && (f.out != "" || cmd.Flags().Changed("nics")):
		return o, usage("--acpi-out and --nics are for --acpi-from-qemu")
	case f.nics < 0 || f.nics > maxPodNICs:
		return o, usage("--nics %d: a pod has 0 to %d network interfaces", f.nics, maxPodNICs)
	}
	if f.dir != "" {
		if o.ACPI, err = filepath.Abs(f.dir); err != nil {
			return o, usage("--acpi: %w", err)
		}
	}
	if f.fromQEMU {
		o.Tables = (&acpiMaker{cfg: cfg, nics: f.nics, out: f.out, progress: cmd.ErrOrStderr()}).tables
	}
	return o, nil
}

// acpiMaker makes the ACPI tables of planned VMs. It starts one QEMU at a time.
type acpiMaker struct {
	cfg      *configs.Config
	nics     int
	out      string
	progress io.Writer

	mu     sync.Mutex
	driver *qemu.Driver // nil until there is something to start
}

// tables is tdx.Config.Tables.
func (m *acpiMaker) tables(ctx context.Context, doc hypervisor.Document) (*tdx.ACPI, string, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.driver == nil {
		path, err := m.cfg.QEMU()
		if err != nil {
			return nil, "", err
		}
		if m.driver, err = qemu.New(ctx, qemu.Config{Path: path, Arch: doc.Architecture}); err != nil {
			return nil, "", fmt.Errorf("hypervisor.path: %w", err)
		}
	}
	// A plan has no interfaces; their addresses are in no table.
	doc.NICs = nil
	for i := range m.nics {
		doc.NICs = append(doc.NICs, hypervisor.NIC{ID: fmt.Sprintf("net%d", i), MAC: fmt.Sprintf("02:00:00:00:00:%02x", i+1)})
	}
	f := m.driver.Features()
	args, err := qemu.EmulatedTDX(doc, f)
	if err != nil {
		return nil, "", err
	}
	machine := fmt.Sprintf("%s with %s and %s", f.Machine, plural(doc.CPU.Count, "vCPU"), plural(m.nics, "network interface"))
	fmt.Fprintf(m.progress, "cloister: starting %s for the ACPI tables of %s, emulated\n", m.driver.Path(), machine)
	started := time.Now()
	ctx, cancel := context.WithTimeoutCause(ctx, acpiTimeout, fmt.Errorf("nothing for %v: %w", acpiTimeout, context.DeadlineExceeded))
	defer cancel()
	blobs, err := tdx.ACPIFromQEMU(ctx, m.driver.Path(), args...)
	if err != nil {
		return nil, "", err
	}
	kept := ""
	if m.out != "" {
		dir := filepath.Join(m.out, tdx.ACPIFolder(doc.CPU.Count))
		if err := blobs.Write(dir); err != nil {
			return nil, "", fmt.Errorf("--acpi-out: %w", err)
		}
		kept = ", kept in " + dir
	}
	fmt.Fprintf(m.progress, "cloister: got them after %.1f s%s\n", time.Since(started).Seconds(), kept)
	return blobs, fmt.Sprintf("those that QEMU %s makes for %s with %s under emulation; that it makes the same for a TD under KVM is not proven",
		strings.TrimSpace(f.Version), f.Machine, plural(m.nics, "network interface")), nil
}
