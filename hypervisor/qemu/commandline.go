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
	"github.com/cloister-project/cloister/hypervisor/supervise"
)

// Names of the files that a command line expects to be inherited, in CommandLine.Files.
const (
	fileQMP     = "qmp"
	fileConsole = "console"
	fileVsock   = "vsock"
	fileTap     = "tap:"   // followed by NIC.ID
	fileVhost   = "vhost:" // followed by NIC.ID
)

// typeMonitor is the type of a QMP monitor as an object.
const typeMonitor = "monitor-qmp"

// PCI slots of the root bus, and device numbers of the channel subsystem; fixed, so that the guest sees the same addresses
// whatever else the VM has. 0 is the host bridge, 0x1f the LPC bridge.
const (
	slotSCSI        = 0x2
	slotVsock       = 0x3
	slotNIC         = 0x4  // and up, maxNICs of them
	slotDirectories = 0x10 // and up, pciFunctions root ports in each
	slotMemory      = 0x1d
	slotBalloon     = 0x1e
	pciFuncs        = 8
)

// commandLine of QEMU.
type commandLine struct {
	args []string
	// files names what is inherited, from supervise.FirstInheritedFD on.
	files []string
}

// Missing says what a QEMU binary lacks. It is errdefs.ErrNotImplemented.
type Missing struct{ What []string }

func (m *Missing) Error() string {
	return "this QEMU lacks " + strings.Join(m.What, ", ") + "; install a QEMU that has it, or change the configuration"
}

// Is makes it an errdefs.ErrNotImplemented.
func (m *Missing) Is(target error) bool { return target == errdefs.ErrNotImplemented }

// newCommandLine builds the command line for a valid document. It touches nothing; drivers tells the block driver of
// each disk that is there at boot (driverFile or driverDevice), by Disk.ID.
func newCommandLine(doc hypervisor.Document, f Features, drivers map[string]string) (commandLine, error) {
	return build(builder{doc: doc}, f, drivers)
}

func build(b builder, f Features, drivers map[string]string) (commandLine, error) {
	doc := b.doc
	if want := doc.Arch(); f.Architecture != want {
		return commandLine{}, fmt.Errorf("the VM is for %s and this QEMU for %s: %w", want, f.Architecture, errdefs.ErrInvalidArgument)
	}
	if err := f.lacks(doc, b.detached); err != nil {
		return commandLine{}, err
	}
	if err := b.machine(f); err != nil {
		return commandLine{}, err
	}
	b.boot(doc.Boot)
	b.control(f)
	b.virtio("virtio-scsi", scsiController, slotSCSI)
	b.vsock(doc.Vsock)
	for i, n := range doc.NICs {
		b.nic(n, slotNIC+i)
	}
	if doc.Memory.Reporting {
		b.virtio("virtio-balloon", "balloon0", slotBalloon, "free-page-reporting=on")
	}
	if doc.Memory.MaxBytes > doc.Memory.Bytes {
		b.room(doc.Memory)
	}
	for i := range doc.SharedDirectories {
		b.rootPort(i)
	}
	for i, d := range doc.Disks {
		if err := b.disk(d, drivers[d.ID], i); err != nil {
			return commandLine{}, err
		}
	}
	return b.commandLine, nil
}

// control adds the monitor and the console.
func (b *builder) control(f Features) {
	if b.detached {
		b.add("-serial", "null")
		return
	}
	b.chardevSocket("qmp", fileQMP)
	if f.has(typeMonitor) {
		b.add("-object", typeMonitor+",id=monitor,chardev=qmp")
	} else {
		b.add("-mon", "chardev=qmp,mode=control") // deprecated where there is the other
	}
	b.chardevSocket("console", fileConsole)
	if b.ccw() {
		b.device("sclpconsole", "chardev=console")
	} else {
		b.add("-serial", "chardev:console")
	}
}

// lacks returns a *Missing if the binary cannot do what the document asks for. A detached machine has no vsock device.
func (f Features) lacks(doc hypervisor.Document, detached bool) error {
	var m Missing
	need := func(types ...string) {
		for _, t := range types {
			if !f.has(t) && !slices.Contains(m.What, t) {
				m.What = append(m.What, t)
			}
		}
	}
	bus := "-pci"
	if doc.Arch() == hypervisor.ArchS390X {
		bus = "-ccw"
		need("sclpconsole")
	}
	need("virtio-scsi"+bus, "scsi-hd", string(doc.Accelerator)+"-accel")
	if f.Machine == "" {
		m.What = append(m.What, "the "+machineAlias[doc.Arch()]+" machine")
	}
	if doc.Memory.Shared {
		need("memory-backend-memfd")
	}
	switch {
	case detached:
	case doc.Vsock.Kind == hypervisor.VsockVhost:
		need("vhost-vsock" + bus)
	case doc.Vsock.Kind == hypervisor.VsockVhostUser:
		need("vhost-user-vsock-pci") // there is none for the channel subsystem
		if bus == "-ccw" {
			need("zpci")
		}
	}
	if len(doc.NICs) > 0 {
		need("virtio-net" + bus)
	}
	if doc.Memory.Reporting {
		need("virtio-balloon" + bus)
	}
	if doc.Memory.MaxBytes > doc.Memory.Bytes {
		need("virtio-mem" + bus)
	}
	if doc.SharedDirectories > 0 {
		need("pcie-root-port", "vhost-user-fs-pci")
	}
	if doc.Sandboxed && !f.Sandbox {
		m.What = append(m.What, "seccomp (-sandbox)")
	}
	m.What = append(m.What, f.lacksTEE(doc)...)
	if len(m.What) == 0 {
		return nil
	}
	return &m
}

type builder struct {
	commandLine
	doc hypervisor.Document
	// detached: the machine inherits no file and is connected to nothing (newEmulatedLine).
	detached bool
	hubs     int
}

func (b *builder) add(args ...string) { b.args = append(b.args, args...) }

// ccw: devices are on IBM's channel subsystem, not on PCI.
func (b *builder) ccw() bool { return b.doc.Arch() == hypervisor.ArchS390X }

func (b *builder) device(props ...string) { b.add("-device", strings.Join(props, ",")) }

// fd returns the number of the next inherited file.
func (b *builder) fd(name string) string {
	b.files = append(b.files, name)
	return strconv.Itoa(supervise.FirstInheritedFD + len(b.files) - 1)
}

func (b *builder) chardevSocket(id, file string) {
	b.add("-chardev", "socket,id="+id+",fd="+b.fd(file))
}

func pciAddress(slot, function int) string { return fmt.Sprintf("addr=%#x.%#x", slot, function) }

// virtio adds a virtio device in its slot, on the bus that the machine has.
func (b *builder) virtio(name, id string, slot int, props ...string) {
	if b.ccw() {
		// A channel device has no legacy interface to switch off: a guest that does not take VIRTIO_F_ACCESS_PLATFORM,
		// which only virtio 1 has, is refused by QEMU.
		b.device(append([]string{name + "-ccw", "id=" + id, fmt.Sprintf("devno=fe.0.%04x", slot)}, append(b.dmaRules(), props...)...)...)
		return
	}
	b.virtioPCI(name, id, slot, props...)
}

// virtioPCI adds a virtio device on PCI.
func (b *builder) virtioPCI(name, id string, slot int, props ...string) {
	fixed := []string{name + "-pci", "id=" + id, pciAddress(slot, 0), "romfile="}
	if b.doc.Confidential != nil {
		fixed = append(fixed, "disable-legacy=on")
	}
	b.device(append(fixed, append(b.dmaRules(), props...)...)...)
}

// dmaRules make a confidential guest use its DMA interface, that is buffers that it shares on purpose: virtio 1.2,
// section 6, VIRTIO_F_ACCESS_PLATFORM.
func (b *builder) dmaRules() []string {
	if b.doc.Confidential == nil {
		return nil
	}
	return []string{"iommu_platform=on"}
}

func (b *builder) boot(boot hypervisor.Boot) {
	// Each is an argument of its own: nothing in it is parsed as options.
	if boot.Firmware != "" {
		b.add("-bios", boot.Firmware)
	}
	b.add("-kernel", boot.Kernel)
	if !boot.Sealed {
		b.add("-initrd", boot.Initrd, "-append", strings.Join(boot.Parameters, " "))
	}
}

func (b *builder) vsock(v hypervisor.Vsock) {
	if b.detached {
		b.virtio(vsockStandIn, "vsock0", slotVsock)
		return
	}
	switch v.Kind {
	case hypervisor.VsockVhost:
		b.virtio("vhost-vsock", "vsock0", slotVsock, fmt.Sprintf("guest-cid=%d", v.CID), "vhostfd="+b.fd(fileVsock))
	case hypervisor.VsockVhostUser:
		b.chardevSocket("vsock", fileVsock)
		if !b.ccw() {
			b.virtioPCI("vhost-user-vsock", "vsock0", slotVsock, "chardev=vsock")
			return
		}
		// PCI devices of this machine are behind an IOMMU. With iommu_platform QEMU would have the vhost-user device
		// follow it (VHOST_USER_IOTLB_MSG), which the embedded one does not. No hardware protects such a VM anyway:
		// Secure Execution has no PCI, and Validate refuses the two together.
		b.device("zpci", fmt.Sprintf("uid=%d,fid=%d", slotVsock, slotVsock), "target=vsock0")
		b.device("vhost-user-vsock-pci", "id=vsock0", pciAddress(slotVsock, 0), "romfile=", "chardev=vsock")
	}
}

func (b *builder) nic(n hypervisor.NIC, slot int) {
	b.add("-netdev", b.netdev(n))
	props := []string{"netdev=net-" + n.ID, "mac=" + n.MAC}
	if n.MTU != 0 {
		props = append(props, fmt.Sprintf("host_mtu=%d", n.MTU))
	}
	b.virtio("virtio-net", "nic-"+n.ID, slot, props...)
}

// netdev is what a network interface is connected to.
func (b *builder) netdev(n hypervisor.NIC) string {
	if b.detached {
		return b.detachedNetdev(n.ID)
	}
	netdev := "tap,id=net-" + n.ID + ",fd=" + b.fd(fileTap+n.ID)
	if n.VhostNet {
		netdev += ",vhost=on,vhostfd=" + b.fd(fileVhost+n.ID)
	}
	return netdev
}

func rootPortID(i int) string { return fmt.Sprintf("share%d", i) }

// rootPort adds a place for a shared directory. No I/O ports are reserved behind it: 64 KiB would not do for all, and
// virtio-fs has none.
func (b *builder) rootPort(i int) {
	props := []string{"pcie-root-port", "id=" + rootPortID(i), "bus=pcie.0", pciAddress(slotDirectories+i/pciFuncs, i%pciFuncs),
		fmt.Sprintf("chassis=%d", i+1), fmt.Sprintf("slot=%d", i+1), "io-reserve=0"}
	if i%pciFuncs == 0 {
		props = append(props, "multifunction=on")
	}
	b.device(props...)
}

// disk is given as JSON, in which a path needs no escaping.
func (b *builder) disk(d hypervisor.Disk, driver string, address int) error {
	node, err := json.Marshal(newBlockNode(d, driver, address))
	if b.detached {
		node, err = detachedNode(d, address)
	}
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
