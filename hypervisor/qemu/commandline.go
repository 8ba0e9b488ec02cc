// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/cloister-project/cloister/hypervisor"
)

// Names of the files that a command line expects to be inherited, in CommandLine.Files.
const (
	fileQMP     = "qmp"
	fileConsole = "console"
	fileVsock   = "vsock"
	fileTap     = "tap:"   // followed by NIC.ID
	fileVhost   = "vhost:" // followed by NIC.ID
)

// PCI slots of the root bus; fixed, so that the guest sees the same addresses whatever else the VM has. 0 is the host
// bridge, 0x1f the LPC bridge.
const (
	slotSCSI    = 0x2
	slotVsock   = 0x3
	slotNIC     = 0x4  // and up, maxNICs of them
	slotFolders = 0x10 // and up, pciFunctions root ports in each
	pciFuncs    = 8
)

// CommandLine of QEMU.
type CommandLine struct {
	Args []string
	// Files names what is inherited, from firstInheritedFD on.
	Files []string
}

// Missing says what a QEMU binary lacks. It is errdefs.ErrNotImplemented.
type Missing struct{ What []string }

func (m *Missing) Error() string {
	return "this QEMU lacks " + strings.Join(m.What, ", ") + "; install a QEMU that has it, or change the configuration"
}

// Is makes it an errdefs.ErrNotImplemented.
func (m *Missing) Is(target error) bool { return target == errdefs.ErrNotImplemented }

// NewCommandLine builds the command line for a valid document. It touches nothing; drivers tells the block driver of
// each disk that is there at boot ("file" or "host_device"), by Disk.ID.
func NewCommandLine(doc hypervisor.Document, f Features, drivers map[string]string) (CommandLine, error) {
	if err := f.lacks(doc); err != nil {
		return CommandLine{}, err
	}
	b := builder{}
	b.machine(doc, f)
	b.boot(doc.Boot)
	b.chardevSocket("qmp", fileQMP)
	b.add("-mon", "chardev=qmp,mode=control")
	b.chardevSocket("console", fileConsole)
	b.add("-serial", "chardev:console")
	b.device("virtio-scsi-pci", "id="+scsiController, pciAddress(slotSCSI, 0), "romfile=")
	b.vsock(doc.Vsock)
	for i, n := range doc.NICs {
		b.nic(n, slotNIC+i)
	}
	for i := range doc.SharedFolderPorts {
		b.rootPort(i)
	}
	for i, d := range doc.Disks {
		if err := b.disk(d, drivers[d.ID], i); err != nil {
			return CommandLine{}, err
		}
	}
	return b.CommandLine, nil
}

// lacks returns a *Missing if the binary cannot do what the document asks for.
func (f Features) lacks(doc hypervisor.Document) error {
	var m Missing
	need := func(types ...string) {
		for _, t := range types {
			if !slices.Contains(f.Types, t) && !slices.Contains(m.What, t) {
				m.What = append(m.What, t)
			}
		}
	}
	need("virtio-scsi-pci", "scsi-hd", string(doc.Accelerator)+"-accel")
	if f.Machine == "" {
		m.What = append(m.What, "the q35 machine")
	}
	if doc.Memory.Shared {
		need("memory-backend-memfd")
	}
	switch doc.Vsock.Kind {
	case hypervisor.VsockVhost:
		need("vhost-vsock-pci")
	case hypervisor.VsockVhostUser:
		need("vhost-user-vsock-pci")
	}
	if len(doc.NICs) > 0 {
		need("virtio-net-pci")
	}
	if doc.SharedFolderPorts > 0 {
		need("pcie-root-port", "vhost-user-fs-pci")
	}
	if doc.Sandboxed && !f.Sandbox {
		m.What = append(m.What, "seccomp (-sandbox)")
	}
	if len(m.What) == 0 {
		return nil
	}
	return &m
}

type builder struct{ CommandLine }

func (b *builder) add(args ...string) { b.Args = append(b.Args, args...) }

func (b *builder) device(props ...string) { b.add("-device", strings.Join(props, ",")) }

// fd gives the number of the next inherited file.
func (b *builder) fd(name string) string {
	b.Files = append(b.Files, name)
	return strconv.Itoa(firstInheritedFD + len(b.Files) - 1)
}

func (b *builder) chardevSocket(id, file string) {
	b.add("-chardev", "socket,id="+id+",fd="+b.fd(file))
}

func pciAddress(slot, function int) string { return fmt.Sprintf("addr=%#x.%#x", slot, function) }

func (b *builder) machine(doc hypervisor.Document, f Features) {
	b.add("-name", "cloister-"+doc.ID+",debug-threads=on", "-uuid", doc.UUID)
	b.add("-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-S")
	if doc.Sandboxed {
		b.add("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny")
	}
	if f.ExitWithParent {
		b.add("-run-with", "exit-with-parent=on")
	}
	mib := strconv.FormatUint(doc.Memory.Bytes>>20, 10) + "M"
	machine := f.Machine
	// What a guest without firmware services, graphics and human does not need; each is probed by the firmware and the
	// kernel at boot. Without the HPET the kernel executes about 10 % fewer instructions until init; it calibrates
	// against the PM timer. dump-guest-core keeps the guest's memory out of a core dump of QEMU.
	for _, off := range machineOff {
		if slices.Contains(f.MachineOptions, off) {
			machine += "," + off + "=off"
		}
	}
	if doc.Memory.Shared {
		machine += ",memory-backend=mem0"
		b.add("-object", "memory-backend-memfd,id=mem0,size="+mib+",share=on")
	}
	b.add("-machine", machine)
	accel := string(doc.Accelerator)
	if doc.Accelerator == hypervisor.AccelTCG {
		accel += ",thread=multi"
	}
	b.add("-accel", accel, "-cpu", doc.CPU.Model)
	b.add("-smp", fmt.Sprintf("cpus=%d,sockets=1,cores=%d,threads=1", doc.CPU.Count, doc.CPU.Count), "-m", "size="+mib)
}

// machineOff are options of the machine that are switched off where the binary has them.
var machineOff = [...]string{"usb", "vmport", "smm", "sata", "smbus", "i8042", "hpet", "dump-guest-core"}

func (b *builder) boot(boot hypervisor.Boot) {
	// Each is an argument of its own: nothing in it is parsed as options.
	b.add("-kernel", boot.Kernel, "-initrd", boot.Initrd, "-append", strings.Join(boot.Parameters, " "))
}

func (b *builder) vsock(v hypervisor.Vsock) {
	switch v.Kind {
	case hypervisor.VsockVhost:
		b.device("vhost-vsock-pci", "id=vsock0", pciAddress(slotVsock, 0), "romfile=", fmt.Sprintf("guest-cid=%d", v.CID), "vhostfd="+b.fd(fileVsock))
	case hypervisor.VsockVhostUser:
		b.chardevSocket("vsock", fileVsock)
		b.device("vhost-user-vsock-pci", "id=vsock0", pciAddress(slotVsock, 0), "romfile=", "chardev=vsock")
	}
}

func (b *builder) nic(n hypervisor.NIC, slot int) {
	netdev := "tap,id=net-" + n.ID + ",fd=" + b.fd(fileTap+n.ID)
	if n.VhostNet {
		netdev += ",vhost=on,vhostfd=" + b.fd(fileVhost+n.ID)
	}
	b.add("-netdev", netdev)
	props := []string{"virtio-net-pci", "id=nic-" + n.ID, pciAddress(slot, 0), "romfile=", "netdev=net-" + n.ID, "mac=" + n.MAC}
	if n.MTU != 0 {
		props = append(props, fmt.Sprintf("host_mtu=%d", n.MTU))
	}
	b.device(props...)
}

func rootPortID(i int) string { return fmt.Sprintf("folder%d", i) }

// rootPort adds a place for a shared folder. No I/O ports are reserved behind it: 64 KiB would not do for all, and
// virtio-fs has none.
func (b *builder) rootPort(i int) {
	props := []string{"pcie-root-port", "id=" + rootPortID(i), "bus=pcie.0", pciAddress(slotFolders+i/pciFuncs, i%pciFuncs),
		fmt.Sprintf("chassis=%d", i+1), fmt.Sprintf("slot=%d", i+1), "io-reserve=0"}
	if i%pciFuncs == 0 {
		props = append(props, "multifunction=on")
	}
	b.device(props...)
}

// disk is given as JSON, in which a path needs no escaping.
func (b *builder) disk(d hypervisor.Disk, driver string, address int) error {
	node, err := json.Marshal(newBlockNode(d, driver, address))
	if err != nil {
		return err
	}
	dev, err := json.Marshal(newSCSIDisk(d, address))
	if err != nil {
		return err
	}
	b.add("-blockdev", string(node), "-device", string(dev))
	return nil
}
