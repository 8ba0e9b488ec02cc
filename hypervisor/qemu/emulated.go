// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/cloister-project/cloister/hypervisor"
)

const (
	// emulatedCPU stands for the host's CPU. Of it the firmware uses the vendor and the width of physical addresses, by
	// which it places the PCI devices' memory: every processor with TDX is Intel's and has 46 bits or more, and OVMF uses
	// no more than 46 of them.
	emulatedCPU = "max,vendor=GenuineIntel,phys-bits=46"
	// vsockStandIn has what the vsock devices have in the eyes of firmware and ACPI: a modern virtio endpoint with one page
	// of MSI-X and no option ROM. It needs nothing of the host.
	vsockStandIn = "virtio-rng-pci"
	diskStandIn  = 1 << 20 // bytes
)

// emulatedFlags are options without a value.
var emulatedFlags = []string{"-nodefaults", "-no-user-config", "-no-reboot", "-S"}

// EmulatedTDX gives the arguments of a machine with the hardware of a TD, that any host can start under emulation: for the
// ACPI tables that QEMU makes, not to run anything. Nothing protects it.
//
// They are those of NewCommandLine, and differ where the TD needs TDX, KVM or a file of the pod's host: accelerator and CPU
// model; no tdx-guest object; the interrupt controller that QEMU takes from a TD (pic=off) is taken here by name; a device
// of another kind in the vsock device's slot; network interfaces connected to nothing; disks without content; no
// connection to anybody. No file is inherited. The caller adds how the VM is controlled.
//
// Errors: errdefs.ErrInvalidArgument if the document is not a valid one of a TD, *Missing if the binary lacks something.
func EmulatedTDX(doc hypervisor.Document, f Features) ([]string, error) {
	if err := Validate(doc); err != nil {
		return nil, err
	}
	if doc.Confidential == nil || doc.Confidential.TDX == nil {
		return nil, fmt.Errorf("the VM is no TD: %w", errdefs.ErrInvalidArgument)
	}
	doc.Accelerator, doc.CPU.Model = hypervisor.AccelTCG, emulatedCPU
	// The devices' rules stay, the object goes.
	doc.Confidential = &hypervisor.Confidential{Platform: doc.Confidential.Platform}
	f.ExitWithParent = false
	f.Types = slices.DeleteFunc(slices.Clone(f.Types), func(t string) bool { return t == typeMonitor })
	f.Types = append(f.Types, "vhost-vsock-pci", "vhost-user-vsock-pci") // replaced below
	line, err := NewCommandLine(doc, f, nil)
	if err != nil {
		return nil, err
	}
	var out []string
	for args, hubs := line.Args, 0; len(args) > 0; {
		option := args[0]
		if slices.Contains(emulatedFlags, option) {
			out, args = append(out, option), args[1:]
			continue
		}
		if len(args) < 2 || !strings.HasPrefix(option, "-") {
			return nil, fmt.Errorf("the emulated machine: argument %q is not understood: %w", option, errdefs.ErrInternal)
		}
		value := args[1]
		args = args[2:]
		switch option {
		case "-chardev", "-mon":
			continue // all lead to inherited files
		case "-serial":
			value = "null"
		case "-machine":
			value += ",pic=off"
		case "-netdev":
			value = fmt.Sprintf("hubport,id=%s,hubid=%d", property(value, "id"), hubs)
			hubs++
		case "-device":
			value = emulatedDevice(value)
		case "-blockdev":
			if value, err = emulatedDisk(value); err != nil {
				return nil, err
			}
		}
		out = append(out, option, value)
	}
	return out, nil
}

// property of a value in QEMU's form "driver,name=value,..."; empty if it is not there.
func property(value, name string) string {
	for p := range strings.SplitSeq(value, ",") {
		if text, ok := strings.CutPrefix(p, name+"="); ok {
			return text
		}
	}
	return ""
}

// emulatedDevice puts the stand-in into a vsock device's place. Other devices, JSON too, stay as they are.
func emulatedDevice(value string) string {
	props := strings.Split(value, ",")
	if props[0] != "vhost-vsock-pci" && props[0] != "vhost-user-vsock-pci" {
		return value
	}
	props[0] = vsockStandIn
	return strings.Join(slices.DeleteFunc(props, func(p string) bool {
		name, _, _ := strings.Cut(p, "=")
		return name == "guest-cid" || name == "vhostfd" || name == "chardev"
	}), ",")
}

// emulatedDisk gives a block node without a file behind it.
func emulatedDisk(value string) (string, error) {
	var n blockNode
	if err := json.Unmarshal([]byte(value), &n); err != nil {
		return "", err
	}
	b, err := json.Marshal(map[string]any{
		"driver": "null-co", "node-name": n.NodeName, "read-only": n.ReadOnly, "size": diskStandIn, "read-zeroes": true,
	})
	return string(b), err
}
