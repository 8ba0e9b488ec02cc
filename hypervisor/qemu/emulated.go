// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/cloister-project/cloister/hypervisor"
	"github.com/cloister-project/cloister/hypervisor/qemu/fwcfg"
)

const (
	// emulatedCPU stands for the host's CPU. Of it the firmware uses the vendor and the width of physical addresses, by
	// which it places the PCI devices' memory: every processor with TDX is Intel's and has 46 bits or more, and OVMF uses
	// no more than 46 of them.
	emulatedCPU = "max,vendor=GenuineIntel,phys-bits=46"
	// vsockStandIn has what the vsock devices have in the eyes of firmware and ACPI: a modern virtio endpoint with one page
	// of MSI-X and no option ROM. It needs nothing of the host.
	vsockStandIn = "virtio-rng"
	diskStandIn  = 1 << 20 // bytes
)

// ACPITables implements hypervisor.TableMaker, for TDs.
func (d *Driver) ACPITables(ctx context.Context, doc hypervisor.Document) (hypervisor.ACPITables, string, error) {
	if err := d.Validate(doc); err != nil {
		return hypervisor.ACPITables{}, "", err
	}
	b, err := d.open(ctx)
	if err != nil {
		return hypervisor.ACPITables{}, "", err
	}
	line, err := newEmulatedLine(doc, b.features)
	if err != nil {
		return hypervisor.ACPITables{}, "", err
	}
	tables, err := fwcfg.ACPITables(ctx, b.path, line.args...)
	if err != nil {
		return hypervisor.ACPITables{}, "", err
	}
	nics := "1 network interface"
	if n := len(doc.NICs); n != 1 {
		nics = fmt.Sprintf("%d network interfaces", n)
	}
	how := fmt.Sprintf("those that QEMU %s makes for %s with %s under emulation; that it makes the same for a TD under KVM is not proven",
		strings.TrimSpace(b.features.Version), b.features.Machine, nics)
	return *tables, how, nil
}

// newEmulatedLine builds the command line of a machine with the hardware of a TD, that any host can start under
// emulation: for the ACPI tables that QEMU makes, not to run anything. Nothing protects it.
//
// It is that of newCommandLine, and differs where the TD needs TDX, KVM or a file of the pod's host: accelerator and CPU
// model; no tdx-guest object; the interrupt controller that QEMU takes from a TD (pic=off) is taken here by name; a device
// of another kind in the vsock device's slot; network interfaces connected to nothing; disks without content; no
// connection to anybody. No file is inherited. The caller adds how the VM is controlled.
//
// Errors: errdefs.ErrInvalidArgument if the document is not one of a TD, *Missing if the binary lacks something.
func newEmulatedLine(doc hypervisor.Document, f Features) (commandLine, error) {
	if doc.Confidential == nil || doc.Confidential.TDX == nil {
		return commandLine{}, fmt.Errorf("the VM is no TD: %w", errdefs.ErrInvalidArgument)
	}
	doc.Accelerator, doc.CPU.Model = hypervisor.AccelTCG, emulatedCPU
	// The devices' rules stay, the object goes.
	doc.Confidential = &hypervisor.Confidential{Platform: doc.Confidential.Platform}
	return build(builder{doc: doc, detached: true}, f, nil)
}

// emptyNode is a block node without a file behind it.
type emptyNode struct {
	Driver     string `json:"driver"`
	NodeName   string `json:"node-name"`
	ReadOnly   bool   `json:"read-only"`
	ReadZeroes bool   `json:"read-zeroes"`
	Size       int    `json:"size"`
}

// detachedNetdev connects a network interface to a hub of its own, on which nobody else is.
func (b *builder) detachedNetdev(id string) string {
	b.hubs++
	return fmt.Sprintf("hubport,id=net-%s,hubid=%d", id, b.hubs-1)
}

func detachedNode(d hypervisor.Disk, address int) ([]byte, error) {
	return json.Marshal(emptyNode{Driver: "null-co", NodeName: diskNodeName(address), ReadOnly: d.ReadOnly, ReadZeroes: true,
		Size: diskStandIn})
}
