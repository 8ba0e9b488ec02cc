// SPDX-License-Identifier: Apache-2.0

package tdx

import (
	"encoding/binary"
	"fmt"
	"path/filepath"

	"github.com/containerd/errdefs"

	"github.com/cloister-project/cloister/hypervisor"
	"github.com/cloister-project/cloister/tee/firmware"
)

// ACPI are the blobs that QEMU hands to the firmware through fw_cfg (QEMU docs/specs/fw_cfg.rst, and the linker/loader of
// its ACPI code), as the firmware reads them: after it set up PCI, since QEMU builds them at that moment.
//
// That the firmware measures these very blobs is tested with a TPM in the TD's place. Blobs that an emulated QEMU makes
// (hypervisor.TableMaker) are not proven to be those of a TD under KVM: they were never compared with hardware. QEMU's own
// code for TDs changes nothing else that the tables are made of, as far as it was read; builds with Intel's earlier
// patches, which were not merged, do: their tables tell a TD of edge-triggered interrupts only.
type ACPI hypervisor.ACPITables

// maxACPI bounds one blob; QEMU pads tables to 128 KiB at least and limits them to 2 MiB.
const maxACPI = 4 << 20

// ReadACPI reads a directory with the files table-loader, rsdp and tables, the blobs without any change.
func ReadACPI(dir string) (*ACPI, error) {
	var a ACPI
	for _, blob := range (*hypervisor.ACPITables)(&a).Blobs() {
		content, _, err := firmware.ReadFile(filepath.Join(dir, blob.Name), maxACPI)
		if err != nil {
			return nil, fmt.Errorf("ACPI blobs: %w", err)
		}
		*blob.Content = content
	}
	return &a, a.check()
}

func (a *ACPI) events() []Event {
	return []Event{event("ACPI table-loader", a.Loader), event("ACPI rsdp", a.RSDP), event("ACPI tables", a.Tables)}
}

// ACPI tables: ACPI Specification 5.2.6 and 5.2.12. The loader's commands are 128 bytes each.
const (
	loaderCommand  = 128
	tableHeader    = 36
	madtEntriesAt  = 44
	localAPIC      = 0
	localX2APIC    = 9
	maxACPIEntries = 4096
)

// check is a look at the shape, so that a wrong file is not taken for a blob.
func (a *ACPI) check() error {
	switch {
	case len(a.Loader) == 0 || len(a.Loader)%loaderCommand != 0:
		return fmt.Errorf("ACPI blobs: table-loader has %d bytes, which are no commands of %d bytes: %w", len(a.Loader), loaderCommand,
			errdefs.ErrInvalidArgument)
	case len(a.RSDP) < 20 || string(a.RSDP[:8]) != "RSD PTR ":
		return fmt.Errorf("ACPI blobs: rsdp does not start with \"RSD PTR \": %w", errdefs.ErrInvalidArgument)
	}
	_, err := a.cpus()
	return err
}

// cpus counts the processors that the tables tell of.
func (a *ACPI) cpus() (int, error) {
	le := binary.LittleEndian
	for at, n := 0, 0; at+tableHeader <= len(a.Tables) && n < maxACPIEntries; n++ {
		t := a.Tables[at:]
		size := uint64(le.Uint32(t[4:]))
		if string(t[:4]) == "FACS" {
			at += int(min(size, uint64(len(t))))
			continue
		}
		if size < tableHeader || size > uint64(len(t)) {
			break
		}
		if string(t[:4]) == "APIC" {
			return madtCPUs(t[:size])
		}
		at += int(size)
	}
	return 0, fmt.Errorf("ACPI blobs: tables hold no table APIC, from which the number of CPUs is read: %w", errdefs.ErrInvalidArgument)
}

func madtCPUs(table []byte) (int, error) {
	cpus := 0
	for at := madtEntriesAt; at < len(table); {
		rest := table[at:]
		if len(rest) < 2 || int(rest[1]) < 2 || int(rest[1]) > len(rest) {
			return 0, fmt.Errorf("ACPI blobs: the table APIC is cut off: %w", errdefs.ErrInvalidArgument)
		}
		// Enabled ones only; those that can be plugged in later are listed too.
		switch entry := rest[:rest[1]]; {
		case entry[0] == localAPIC && len(entry) == 8 && entry[4]&1 != 0,
			entry[0] == localX2APIC && len(entry) == 16 && entry[8]&1 != 0:
			cpus++
		}
		at += int(rest[1])
	}
	return cpus, nil
}
