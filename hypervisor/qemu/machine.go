// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"fmt"
	"runtime"
	"slices"
	"strconv"

	"github.com/cloister-project/cloister/hypervisor"
)

// machineAlias names the machine of each architecture; the concrete, versioned type behind it is pinned on the command
// line (Features.Machine).
var machineAlias = map[hypervisor.Architecture]string{
	hypervisor.ArchAMD64: "q35",
	hypervisor.ArchS390X: "s390-ccw-virtio",
}

// qemuTarget is QEMU's name of an architecture.
var qemuTarget = map[hypervisor.Architecture]string{
	hypervisor.ArchAMD64: "x86_64",
	hypervisor.ArchS390X: "s390x",
}

func hostArchitecture() hypervisor.Architecture { return hypervisor.Architecture(runtime.GOARCH) }

// machineOff are options of the machine that are switched off where the binary has them: what a guest without graphics
// and human does not need. Each is probed by the firmware and the kernel at boot. Without the HPET the kernel executes
// about 10 % fewer instructions until init; it calibrates against the PM timer. SMM must be off for SEV-SNP and TDX.
// dump-guest-core keeps the guest's memory out of a core dump of QEMU.
var machineOff = [...]string{"usb", "vmport", "smm", "sata", "smbus", "i8042", "hpet", "dump-guest-core"}

func (b *builder) machine(f Features) error {
	doc := b.doc
	b.add("-name", "cloister-"+doc.ID+",debug-threads=on", "-uuid", doc.UUID)
	b.add("-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-S")
	if doc.Sandboxed {
		b.add("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny")
	}
	if f.ExitWithParent && !b.detached {
		b.add("-run-with", "exit-with-parent=on")
	}
	mib := megabytes(doc.Memory.Bytes)
	machine := f.Machine
	for _, off := range machineOff {
		if slices.Contains(f.MachineOptions, off) {
			machine += "," + off + "=off"
		}
	}
	if doc.Memory.Shared {
		// In a VM with private memory this backs the half that the guest shares; the private half is the kernel's.
		machine += ",memory-backend=mem0"
		b.add("-object", "memory-backend-memfd,id=mem0,size="+mib+",share=on")
	}
	object, err := teeObject(doc)
	if err != nil {
		return err
	}
	if object != nil {
		machine += ",confidential-guest-support=" + teeObjectID
		b.add("-object", string(object))
	}
	if b.detached {
		machine += ",pic=off" // QEMU does this to a TD by itself
	}
	b.add("-machine", machine)
	accel := string(doc.Accelerator)
	if doc.Accelerator == hypervisor.AccelTCG {
		accel += ",thread=multi"
	}
	if c := doc.Confidential; c != nil && (c.SNP != nil || c.TDX != nil) {
		accel += ",kernel-irqchip=split" // the guest's interrupt controllers, but the local ones, are emulated by QEMU
	}
	b.add("-accel", accel, "-cpu", doc.CPU.Model)
	memory := "size=" + mib
	if doc.Memory.MaxBytes > doc.Memory.Bytes {
		memory += ",maxmem=" + megabytes(doc.Memory.MaxBytes)
	}
	b.add("-smp", fmt.Sprintf("cpus=%d,sockets=1,cores=%d,threads=1", doc.CPU.Count, doc.CPU.Count), "-m", memory)
	return nil
}

func megabytes(bytes uint64) string { return strconv.FormatUint(bytes>>20, 10) + "M" }

// room adds a device by which the guest gets more memory later. Its memory is mapped by vhost-user devices from the start, and
// takes none of the host's before the guest uses it.
func (b *builder) room(m hypervisor.Memory) {
	b.add("-object", "memory-backend-memfd,id=mem1,size="+megabytes(m.MaxBytes-m.Bytes)+",share=on,reserve=off")
	b.virtio("virtio-mem", memoryDevice, slotMemory, "memdev=mem1", "requested-size=0")
}
