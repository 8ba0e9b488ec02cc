// SPDX-License-Identifier: Apache-2.0

package cloudhypervisor

// The bodies of requests, as far as they are used: schemas of Cloud Hypervisor's OpenAPI document by their names there
// (vmm/src/api/openapi/cloud-hypervisor.yaml). What its default could change silently is always sent.

type vmConfig struct {
	CPUs     cpusConfig     `json:"cpus"`
	Memory   memoryConfig   `json:"memory"`
	Payload  payloadConfig  `json:"payload"`
	Disks    []diskConfig   `json:"disks,omitempty"`
	RNG      rngConfig      `json:"rng"`
	Serial   consoleConfig  `json:"serial"`
	Console  consoleConfig  `json:"console"`
	Vsock    vsockConfig    `json:"vsock"`
	PVPanic  bool           `json:"pvpanic"`
	Platform platformConfig `json:"platform"`
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
	Kernel    string `json:"kernel"`
	Cmdline   string `json:"cmdline"`
	Initramfs string `json:"initramfs"`
}

// diskConfig always has the type of the image: a guest that writes the header of another one onto its raw disk must not have
// it found at the next start.
type diskConfig struct {
	ID        string `json:"id"`
	Path      string `json:"path"`
	ReadOnly  bool   `json:"readonly"`
	Serial    string `json:"serial"`
	ImageType string `json:"image_type"`
}

type netConfig struct {
	ID        string `json:"id"`
	MAC       string `json:"mac"`
	MTU       int    `json:"mtu,omitempty"`
	NumQueues int    `json:"num_queues"`
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
	SystemUUID string `json:"system_uuid"`
}
