// SPDX-License-Identifier: Apache-2.0

package cloudhypervisor

import (
	"encoding/json"
	"fmt"
	"math"
	"slices"
	"strings"

	"github.com/cloister-project/cloister/hypervisor"
)

// field is a property of a schema: a type of JSON's ("string", "boolean", "integer"), an enumeration's values, another schema
// by its name, or a list of one ("[]Name").
type field struct {
	kind string
	enum []string
	min  int64
}

type schema struct {
	required []string
	fields   map[string]field
}

var (
	str     = field{kind: "string"}
	boolean = field{kind: "boolean"}
	integer = field{kind: "integer"}
)

func of(name string) field { return field{kind: name} }

// schemas are facts of Cloud Hypervisor's OpenAPI document: every property of the schemas that this driver uses, so that a
// misspelled one, one of another type and a missing one are found. What is in it only for certain builds is left out.
var schemas = map[string]schema{
	"VmConfig": {[]string{"payload"}, map[string]field{
		"cpus": of("CpusConfig"), "memory": of("MemoryConfig"), "payload": of("PayloadConfig"), "disks": of("[]DiskConfig"),
		"net": of("[]NetConfig"), "rng": of("RngConfig"), "balloon": of("BalloonConfig"), "fs": of("[]FsConfig"),
		"serial": of("SerialConfig"), "console": of("ConsoleConfig"), "vsock": of("VsockConfig"), "iommu": boolean, "watchdog": boolean,
		"pvpanic": boolean, "platform": of("PlatformConfig"),
		"landlock_enable": boolean, "landlock_rules": of("[]LandlockConfig"),
	}},
	"CpusConfig": {[]string{"boot_vcpus", "max_vcpus"}, map[string]field{
		"boot_vcpus": {kind: "integer", min: 1}, "max_vcpus": {kind: "integer", min: 1}, "kvm_hyperv": boolean, "max_phys_bits": integer,
		"nested": boolean,
	}},
	"MemoryConfig": {[]string{"size"}, map[string]field{
		"size": integer, "hotplug_size": integer, "hotplugged_size": integer, "mergeable": boolean, "hotplug_method": str, "shared": boolean,
		"hugepages": boolean, "hugepage_size": integer, "prefault": boolean, "thp": boolean,
	}},
	"PayloadConfig": {nil, map[string]field{
		"firmware": str, "kernel": str, "cmdline": str, "initramfs": str, "igvm": str, "host_data": str,
		"fw_cfg_config": of("FwCfgConfig"),
	}},
	// Not in the document: vmm/src/vm_config.rs, for builds with it.
	"FwCfgConfig": {nil, map[string]field{
		"e820": boolean, "kernel": boolean, "cmdline": boolean, "initramfs": boolean, "acpi_tables": boolean,
	}},
	"DiskConfig": {nil, map[string]field{
		"path": str, "readonly": boolean, "direct": boolean, "iommu": boolean, "num_queues": integer, "queue_size": integer,
		"vhost_user": boolean, "vhost_socket": str, "pci_segment": integer, "id": str, "serial": str, "rate_limit_group": str,
		"backing_files": boolean, "sparse": boolean,
		"image_type": {kind: "string", enum: []string{"FlatVmdk", "FixedVhd", "Qcow2", "Raw", "Vhdx", "Unknown"}},
	}},
	"NetConfig": {nil, map[string]field{
		"tap": str, "ip": str, "mask": str, "mac": str, "host_mac": str, "mtu": integer, "iommu": boolean, "num_queues": integer,
		"queue_size": integer, "vhost_user": boolean, "vhost_socket": str, "vhost_mode": str, "id": str, "pci_segment": integer,
		"offload_tso": boolean, "offload_ufo": boolean, "offload_csum": boolean,
	}},
	"FsConfig": {[]string{"num_queues", "queue_size", "socket", "tag"}, map[string]field{
		"tag": str, "socket": str, "num_queues": integer, "queue_size": integer, "pci_segment": integer, "id": str,
	}},
	"RngConfig":    {[]string{"src"}, map[string]field{"src": str, "iommu": boolean, "id": str, "pci_segment": integer}},
	"SerialConfig": {[]string{"mode"}, map[string]field{"file": str, "socket": str, "mode": {kind: "string", enum: consoleModes}}},
	"ConsoleConfig": {[]string{"mode"}, map[string]field{
		"file": str, "socket": str, "mode": {kind: "string", enum: consoleModes}, "iommu": boolean,
	}},
	"BalloonConfig": {[]string{"size"}, map[string]field{
		"size": integer, "deflate_on_oom": boolean, "free_page_reporting": boolean,
	}},
	"VsockConfig": {[]string{"cid", "socket"}, map[string]field{
		"cid": {kind: "integer", min: 3}, "socket": str, "iommu": boolean, "pci_segment": integer, "id": str,
	}},
	"PlatformConfig": {nil, map[string]field{
		"num_pci_segments": integer, "system_serial_number": str, "system_uuid": str, "tdx": boolean, "sev_snp": boolean, "iommufd": boolean,
	}},
	"LandlockConfig": {[]string{"path", "access"}, map[string]field{"path": str, "access": {kind: "string", enum: []string{"r", "w", "rw"}}}},
	"VmRemoveDevice": {nil, map[string]field{"id": str}},
}

var consoleModes = []string{"Off", "Pty", "Tty", "File", "Socket", "Null"}

// bodies are the schemas of the requests' bodies; empty: none.
var bodies = map[string]string{
	"vm.create": "VmConfig", "vm.add-net": "NetConfig", "vm.add-disk": "DiskConfig", "vm.add-fs": "FsConfig",
	"vm.remove-device": "VmRemoveDevice", "vm.boot": "", "vmm.ping": "",
}

// checkRequest returns what is wrong with a request.
func checkRequest(r hypervisor.Request) []string {
	name, ok := strings.CutPrefix(r.Path, "/api/v1/")
	want, known := bodies[name]
	switch {
	case !ok || !known:
		return []string{"unknown endpoint " + r.Path}
	case r.Method != map[bool]string{true: "GET", false: "PUT"}[name == "vmm.ping"]:
		return []string{"method " + r.Method}
	case want == "" && len(r.Body) > 0:
		return []string{"a body where there is none"}
	case want == "":
		return nil
	}
	var body any
	if err := json.Unmarshal(r.Body, &body); err != nil {
		return []string{err.Error()}
	}
	return checkValue("", of(want), body)
}

func checkValue(at string, f field, value any) []string {
	wrong := []string{fmt.Sprintf("%s: %v is no %s", at, value, f.kind)}
	switch f.kind {
	case "string":
		if s, ok := value.(string); !ok || len(f.enum) > 0 && !slices.Contains(f.enum, s) {
			return wrong
		}
		return nil
	case "boolean":
		if _, ok := value.(bool); !ok {
			return wrong
		}
		return nil
	case "integer":
		if n, ok := value.(float64); !ok || n != math.Trunc(n) || n < float64(f.min) {
			return wrong
		}
		return nil
	}
	if name, ok := strings.CutPrefix(f.kind, "[]"); ok {
		list, ok := value.([]any)
		if !ok {
			return wrong
		}
		var faults []string
		for i, v := range list {
			faults = append(faults, checkValue(fmt.Sprintf("%s[%d]", at, i), of(name), v)...)
		}
		return faults
	}
	object, ok := value.(map[string]any)
	if !ok {
		return wrong
	}
	s := schemas[f.kind]
	var faults []string
	for _, r := range s.required {
		if object[r] == nil {
			faults = append(faults, fmt.Sprintf("%s: %s is missing", at, r))
		}
	}
	for k, v := range object {
		if p, ok := s.fields[k]; ok {
			faults = append(faults, checkValue(at+"."+k, p, v)...)
		} else {
			faults = append(faults, fmt.Sprintf("%s: %s has no property %s", at, f.kind, k))
		}
	}
	return faults
}
