// SPDX-License-Identifier: Apache-2.0

package cloudhypervisor

import (
	"encoding/hex"
	"path/filepath"
	"strings"

	"github.com/cloister-project/cloister/hypervisor"
)

// The bodies of requests, as far as they are used: schemas of Cloud Hypervisor's OpenAPI document by their names there
// (vmm/src/api/openapi/cloud-hypervisor.yaml). What its default could change silently is always sent.

type vmConfig struct {
	CPUs           cpusConfig       `json:"cpus"`
	Memory         memoryConfig     `json:"memory"`
	Payload        payloadConfig    `json:"payload"`
	Disks          []diskConfig     `json:"disks,omitempty"`
	RNG            rngConfig        `json:"rng"`
	Balloon        *balloonConfig   `json:"balloon,omitempty"`
	Serial         consoleConfig    `json:"serial"`
	Console        consoleConfig    `json:"console"`
	Vsock          vsockConfig      `json:"vsock"`
	Platform       platformConfig   `json:"platform"`
	LandlockEnable bool             `json:"landlock_enable"`
	LandlockRules  []landlockConfig `json:"landlock_rules,omitempty"`
}

type cpusConfig struct {
	Boot   int  `json:"boot_vcpus"`
	Max    int  `json:"max_vcpus"`
	Nested bool `json:"nested"`
}

type memoryConfig struct {
	Size   uint64 `json:"size"`
	Shared bool   `json:"shared"`
}

type payloadConfig struct {
	Kernel    string       `json:"kernel"`
	Cmdline   string       `json:"cmdline"`
	Initramfs string       `json:"initramfs"`
	IGVM      string       `json:"igvm,omitempty"`
	HostData  string       `json:"host_data,omitempty"`
	FWCfg     *fwCfgConfig `json:"fw_cfg_config,omitempty"`
}

// fwCfgConfig is what firmware finds behind fw_cfg: with hashes of the first three in measured memory (vmm/src/vm_config.rs; the
// OpenAPI document does not have it).
type fwCfgConfig struct {
	Kernel    bool `json:"kernel"`
	Cmdline   bool `json:"cmdline"`
	Initramfs bool `json:"initramfs"`
	ACPI      bool `json:"acpi_tables"`
	E820      bool `json:"e820"`
}

// diskConfig always has the type of the image: a guest that writes the header of another one onto its raw disk must not have
// it found at the next start.
type diskConfig struct {
	ID         string `json:"id"`
	Path       string `json:"path"`
	ReadOnly   bool   `json:"readonly"`
	Serial     string `json:"serial"`
	ImageType  string `json:"image_type"`
	PCISegment int    `json:"pci_segment"`
}

type netConfig struct {
	ID        string `json:"id"`
	MAC       string `json:"mac"`
	MTU       int    `json:"mtu,omitempty"`
	NumQueues int    `json:"num_queues"`
}

type fsConfig struct {
	ID        string `json:"id"`
	Tag       string `json:"tag"`
	Socket    string `json:"socket"`
	NumQueues int    `json:"num_queues"`
	QueueSize int    `json:"queue_size"`
}

type removeDevice struct {
	ID string `json:"id"`
}

// balloonConfig is a balloon of no size, for its free page reporting.
type balloonConfig struct {
	Size      uint64 `json:"size"`
	Reporting bool   `json:"free_page_reporting"`
}

type rngConfig struct {
	Src string `json:"src"`
}

type consoleConfig struct {
	Mode string `json:"mode"`
}

type vsockConfig struct {
	CID    uint32 `json:"cid"`
	Socket string `json:"socket"`
}

type platformConfig struct {
	SystemUUID     string `json:"system_uuid"`
	NumPCISegments int    `json:"num_pci_segments"`
	SNP            bool   `json:"sev_snp,omitempty"`
}

// landlockConfig gives access below a path beside what the configuration names itself; "r" or "rw".
type landlockConfig struct {
	Path   string `json:"path"`
	Access string `json:"access"`
}

const (
	imageRaw = "Raw"
	// modeTTY writes to standard output, from where the owner reads the console with a bound of its own.
	modeTTY = "Tty"
	modeOff = "Off"
	// onePair is a queue to send and one to receive.
	onePair = 2
	// fsQueue is the length of a virtio-fs queue, which limits the requests under way.
	fsQueue = 1024

	// diskSegments are PCI segments with nothing but disks on them, 31 on each beside the host bridge; everything else is on
	// the first one.
	diskSegments    = 8
	disksPerSegment = 31
	maxDisks        = diskSegments * disksPerSegment
	// maxOthers are the 32 places of the first segment, less those of the host bridge, the entropy source, vsock and the balloon.
	maxOthers = 32 - 4
)

// Names in a VM's state directory.
const (
	apiName   = "api"
	vsockName = "vsock"
	// disksName is the directory where the VMM finds its hot-plugged disks, read-only and writable ones (see mountNS).
	disksName   = "disks"
	readOnlyDir = "ro"
	writableDir = "rw"
)

// Ids of devices have prefixes of their own: those that Cloud Hypervisor makes up begin with "_".
func diskID(id string) string      { return "disk-" + id }
func nicID(id string) string       { return "nic-" + id }
func directoryID(id string) string { return "share-" + id }

// newDisk describes a disk in a place of the table of disks, whose image the VMM finds at path.
func newDisk(d hypervisor.Disk, place int, path string) diskConfig {
	return diskConfig{
		ID: diskID(d.ID), Path: path, ReadOnly: d.ReadOnly, Serial: d.Serial, ImageType: imageRaw,
		PCISegment: 1 + place/disksPerSegment,
	}
}

func newDirectory(s hypervisor.SharedDirectory) fsConfig {
	return fsConfig{ID: directoryID(s.ID), Tag: s.Tag, Socket: s.Socket, NumQueues: 1, QueueSize: fsQueue}
}

// snpOf is a document's SEV-SNP launch, or nil.
func snpOf(doc hypervisor.Document) *hypervisor.SNP {
	if doc.Confidential == nil {
		return nil
	}
	return doc.Confidential.SNP
}

func newVMConfig(doc hypervisor.Document, stateDir string) vmConfig {
	c := vmConfig{
		CPUs:   cpusConfig{Boot: doc.CPU.Count, Max: doc.CPU.Count},
		Memory: memoryConfig{Size: doc.Memory.Bytes, Shared: doc.Memory.Shared},
		Payload: payloadConfig{
			Kernel: doc.Boot.Kernel, Initramfs: doc.Boot.Initrd, Cmdline: strings.Join(doc.Boot.Parameters, " "),
		},
		RNG:            rngConfig{Src: "/dev/urandom"},
		Serial:         consoleConfig{Mode: modeTTY},
		Console:        consoleConfig{Mode: modeOff},
		Vsock:          vsockConfig{CID: doc.Vsock.CID, Socket: filepath.Join(stateDir, vsockName)},
		Platform:       platformConfig{SystemUUID: doc.UUID, NumPCISegments: 1 + diskSegments},
		LandlockEnable: doc.Sandboxed,
	}
	if doc.Sandboxed {
		disks := filepath.Join(stateDir, disksName)
		c.LandlockRules = []landlockConfig{
			{Path: filepath.Join(disks, readOnlyDir), Access: "r"}, {Path: filepath.Join(disks, writableDir), Access: "rw"},
		}
	}
	if snp := snpOf(doc); snp != nil {
		c.Platform.SNP = true
		c.Payload.IGVM, c.Payload.HostData = doc.Boot.Firmware, hex.EncodeToString(snp.HostData)
		c.Payload.FWCfg = &fwCfgConfig{Kernel: true, Cmdline: true, Initramfs: true, ACPI: true, E820: true}
		if doc.Sandboxed {
			c.LandlockRules = append(c.LandlockRules, landlockConfig{Path: "/dev/sev", Access: "rw"})
		}
	}
	if doc.Memory.Reporting {
		c.Balloon = &balloonConfig{Reporting: true}
	}
	for i, d := range doc.Disks {
		c.Disks = append(c.Disks, newDisk(d, i, d.Path))
	}
	return c
}
