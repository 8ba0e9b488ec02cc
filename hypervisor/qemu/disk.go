// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"fmt"

	"github.com/cloister-project/cloister/hypervisor"
)

// QEMU's block drivers of what a disk can be on the host.
const (
	driverFile   = "file"
	driverDevice = "host_device"
)

const (
	scsiController = "scsi0"
	// What QEMU's virtio-scsi has is 256 targets of 16384 LUNs; single-byte LUN addresses are enough.
	scsiTargets = 256
	scsiLUNs    = 16
)

// blockNode is the argument of blockdev-add and -blockdev. The disk uses the file's node itself, without a node of the
// raw format in between: the image is never probed for a format, and each change of QEMU's graph costs time in
// proportion to its nodes.
type blockNode struct {
	Driver       string `json:"driver"`
	NodeName     string `json:"node-name"`
	Filename     string `json:"filename"`
	ReadOnly     bool   `json:"read-only"`
	AutoReadOnly bool   `json:"auto-read-only"`
	Discard      string `json:"discard,omitempty"`
	Locking      string `json:"locking"`
}

// scsiDisk is the argument of device_add and -device for a disk.
type scsiDisk struct {
	Driver   string `json:"driver"`
	ID       string `json:"id"`
	Bus      string `json:"bus"`
	Channel  int    `json:"channel"`
	Target   int    `json:"scsi-id"`
	LUN      int    `json:"lun"`
	Drive    string `json:"drive"`
	Serial   string `json:"serial"`
	DeviceID string `json:"device_id"`
	// An error of the host's disk is the guest's to handle. QEMU's default for a full disk stops the VM.
	WriteError string `json:"werror"`
	ReadError  string `json:"rerror"`
}

// QEMU's ids have prefixes of their own, so that no id of a caller collides with another object. A node's name has at
// most 31 characters, too few for a caller's id.
func diskNodeName(address int) string { return fmt.Sprintf("disk-%d", address) }
func diskDeviceID(id string) string   { return "scsi-" + id }

// newBlockNode describes a disk's image. A read-only image is shared by many VMs and never written, so it needs no lock;
// a writable one is locked, which keeps a second VM from it.
func newBlockNode(d hypervisor.Disk, driver string, address int) blockNode {
	n := blockNode{Driver: driver, NodeName: diskNodeName(address), Filename: d.Path, ReadOnly: d.ReadOnly, Locking: "off"}
	if !d.ReadOnly {
		n.Discard, n.Locking = "unmap", "auto"
	}
	return n
}

func newSCSIDisk(d hypervisor.Disk, address int) scsiDisk {
	return scsiDisk{
		Driver:   "scsi-hd",
		ID:       diskDeviceID(d.ID),
		Bus:      scsiController + ".0",
		Target:   address % scsiTargets,
		LUN:      address / scsiTargets,
		Drive:    diskNodeName(address),
		Serial:   d.Serial,
		DeviceID: d.Serial,

		WriteError: "report",
		ReadError:  "report",
	}
}
