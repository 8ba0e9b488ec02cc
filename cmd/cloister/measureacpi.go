// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/cloister-project/cloister/configs"
	"github.com/cloister-project/cloister/tee"
	"github.com/cloister-project/cloister/virtcontainers/dryrun"
)

// maxPodNICs is what a VM has places for.
const maxPodNICs = 8

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
	cmd.Flags().StringVar(&f.dir, "acpi", "",
		"tdx: directory with the VM's ACPI blobs table-loader, rsdp and tables, for RTMR0, or with a directory vcpus-N of them for each size")
	cmd.Flags().BoolVar(&f.fromQEMU, "acpi-from-qemu", false, "tdx: get the ACPI blobs from this machine's QEMU, under emulation")
	cmd.Flags().IntVar(&f.nics, "nics", 1, "network interfaces of the pod, with --acpi-from-qemu")
	cmd.Flags().StringVar(&f.out, "acpi-out", "", "keep the blobs of --acpi-from-qemu in this directory, for --acpi")
}

// tables checks the flags.
func (f *acpiFlags) tables(cmd *cobra.Command, cfg *configs.Config) (t dryrun.Tables, err error) {
	switch {
	case f.dir != "" && f.fromQEMU:
		return t, usage("--acpi and --acpi-from-qemu: the tables come from one of them")
	case (f.dir != "" || f.fromQEMU) && cfg.TEE.Platform != string(tee.TDX):
		return t, usage("--acpi and --acpi-from-qemu are for the platform tdx; this is %q", cfg.TEE.Platform)
	case !f.fromQEMU && (f.out != "" || cmd.Flags().Changed("nics")):
		return t, usage("--acpi-out and --nics are for --acpi-from-qemu")
	case f.nics < 0 || f.nics > maxPodNICs:
		return t, usage("--nics %d: a pod has 0 to %d network interfaces", f.nics, maxPodNICs)
	}
	t = dryrun.Tables{FromVMM: f.fromQEMU, NICs: f.nics, Out: f.out}
	t.Progress = func(text string) { fmt.Fprintln(cmd.ErrOrStderr(), "cloister:", text) }
	if f.dir != "" {
		if t.Dir, err = filepath.Abs(f.dir); err != nil {
			return t, usage("--acpi: %w", err)
		}
	}
	return t, nil
}
