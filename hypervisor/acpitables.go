// SPDX-License-Identifier: Apache-2.0

package hypervisor

import (
	"fmt"
	"os"
	"path/filepath"
)

// ACPITables are the blobs that a VMM hands to the firmware (QEMU's fw_cfg files etc/table-loader, etc/acpi/rsdp and
// etc/acpi/tables).
type ACPITables struct {
	Loader, RSDP, Tables []byte
}

// ACPIBlob is one of the tables' blobs and the name of its file where they are kept.
type ACPIBlob struct {
	Name    string
	Content *[]byte
}

// Blobs returns all blobs of a, to be read or written.
func (a *ACPITables) Blobs() []ACPIBlob {
	return []ACPIBlob{{"table-loader", &a.Loader}, {"rsdp", &a.RSDP}, {"tables", &a.Tables}}
}

// ACPIDirectory names the directory of a VM's tables among those of VMs of other sizes.
func ACPIDirectory(vcpus int) string { return fmt.Sprintf("vcpus-%d", vcpus) }

// Write makes a directory with a file for each blob.
func (a *ACPITables) Write(dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	for _, b := range a.Blobs() {
		if err := os.WriteFile(filepath.Join(dir, b.Name), *b.Content, 0o644); err != nil {
			return err
		}
	}
	return nil
}
