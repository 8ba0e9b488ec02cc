// SPDX-License-Identifier: Apache-2.0

package ocispec

import (
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/cloister-project/cloister/agent-protocol/wire"
)

// unifiedKey is a cgroup v2 file: "memory.high". No slash, so that it stays in the container's cgroup.
var unifiedKey = regexp.MustCompile(`^[a-z]+(\.[a-z0-9_]+)+$`)

// Resources copies the limits that mean something in the guest. Block I/O, huge pages, RDMA and network classes are
// dropped: they name devices or pools of the host. So is swap, the guest has none. The result is never nil and has no
// device rules.
func (g *Guest) Resources(in *specs.LinuxResources) (*specs.LinuxResources, error) {
	out := &specs.LinuxResources{}
	if in == nil {
		return out, nil
	}
	if m := in.Memory; m != nil {
		if m.Limit != nil && *m.Limit < -1 || m.Reservation != nil && *m.Reservation < -1 {
			return nil, refused("resources.memory has a negative limit")
		}
		out.Memory = &specs.LinuxMemory{Limit: m.Limit, Reservation: m.Reservation, CheckBeforeUpdate: m.CheckBeforeUpdate}
	}
	if c := in.CPU; c != nil {
		out.CPU = &specs.LinuxCPU{Shares: c.Shares, Quota: c.Quota, Burst: c.Burst, Period: c.Period, Idle: c.Idle}
		if g.hasCPUs(c.Cpus) {
			out.CPU.Cpus = c.Cpus
		}
	}
	if p := in.Pids; p != nil {
		out.Pids = &specs.LinuxPids{Limit: p.Limit}
	}
	for key, value := range in.Unified {
		if !unifiedKey.MatchString(key) || strings.ContainsAny(value, "\x00\n") {
			return nil, refused("resources.unified: %q is not a cgroup v2 limit", key)
		}
		switch key {
		case "memory.min", "memory.low", "memory.high", "memory.max", "memory.oom.group",
			"cpu.weight", "cpu.weight.nice", "cpu.max", "cpu.max.burst", "cpu.idle", "pids.max":
			if out.Unified == nil {
				out.Unified = map[string]string{}
			}
			out.Unified[key] = value
			continue
		}
		switch controller, _, _ := strings.Cut(key, "."); controller {
		case "cpuset", "io", "hugetlb", "rdma", "misc", "dmem": // of the host's devices and pools
		case "memory":
			if !strings.HasPrefix(key, "memory.swap.") && !strings.HasPrefix(key, "memory.zswap.") {
				return nil, refused("resources.unified: %q is not allowed", key)
			}
		default:
			return nil, refused("resources.unified: %q is not allowed", key)
		}
	}
	return out, nil
}

// MergeResources puts the limits of an update over those that a container has.
func MergeResources(have, update *specs.LinuxResources) *specs.LinuxResources {
	out := *have
	if u := update.Memory; u != nil {
		m := specs.LinuxMemory{}
		if have.Memory != nil {
			m = *have.Memory
		}
		over(&m.Limit, u.Limit)
		over(&m.Reservation, u.Reservation)
		m.CheckBeforeUpdate = u.CheckBeforeUpdate
		out.Memory = &m
	}
	if u := update.CPU; u != nil {
		c := specs.LinuxCPU{}
		if have.CPU != nil {
			c = *have.CPU
		}
		over(&c.Shares, u.Shares)
		over(&c.Quota, u.Quota)
		over(&c.Burst, u.Burst)
		over(&c.Period, u.Period)
		over(&c.Idle, u.Idle)
		if u.Cpus != "" {
			c.Cpus = u.Cpus
		}
		out.CPU = &c
	}
	if update.Pids != nil {
		out.Pids = update.Pids
	}
	out.Unified = nil
	for _, from := range []map[string]string{have.Unified, update.Unified} {
		for k, v := range from {
			if out.Unified == nil {
				out.Unified = map[string]string{}
			}
			out.Unified[k] = v
		}
	}
	return &out
}

func over[T any](have **T, update *T) {
	if update != nil {
		*have = update
	}
}

// hasCPUs reports whether every CPU of a list such as "0-3,8" is one of the guest's.
func (g *Guest) hasCPUs(list string) bool {
	if list == "" {
		return false
	}
	for _, part := range strings.Split(list, ",") {
		first, last, isRange := strings.Cut(strings.TrimSpace(part), "-")
		if !isRange {
			last = first
		}
		lo, err1 := strconv.Atoi(first)
		hi, err2 := strconv.Atoi(last)
		if err1 != nil || err2 != nil || lo < 0 || hi < lo || hi >= g.cpus() {
			return false
		}
	}
	return true
}

// Devices that libcontainer makes for every container, by path.
var standardDevices = map[string][2]int64{
	"/dev/null":    {1, 3},
	"/dev/zero":    {1, 5},
	"/dev/full":    {1, 7},
	"/dev/random":  {1, 8},
	"/dev/urandom": {1, 9},
	"/dev/tty":     {5, 0},
	"/dev/ptmx":    {5, 2},
	"/dev/console": {5, 1},
}

// devices lets through the standard devices (which libcontainer makes anyway) and the further ones of package wire. The numbers that the
// host sends must be those that the guest has: another number is another device.
func (g *Guest) devices(in []specs.LinuxDevice) ([]specs.LinuxDevice, error) {
	var out []specs.LinuxDevice
	seen := map[string]bool{}
	for _, d := range in {
		if seen[d.Path] {
			return nil, refused("device %q is named twice", d.Path)
		}
		seen[d.Path] = true
		if d.Type != "c" && d.Type != "u" {
			return nil, refused("device %q is of type %q: only character devices of the guest are allowed", d.Path, d.Type)
		}
		if want, ok := standardDevices[d.Path]; ok {
			if want != [2]int64{d.Major, d.Minor} {
				return nil, refused("device %q has the numbers %d:%d, in the guest it is %d:%d", d.Path, d.Major, d.Minor, want[0], want[1])
			}
			continue
		}
		if !slices.Contains(wire.ContainerDevices, d.Path) {
			return nil, refused("device %q is not one that the guest gives to containers", d.Path)
		}
		major, minor, ok := g.device(d.Path)
		if !ok || major != d.Major || minor != d.Minor {
			return nil, refused("device %q (%d:%d) does not exist in the guest", d.Path, d.Major, d.Minor)
		}
		keep := specs.LinuxDevice{Path: d.Path, Type: "c", Major: major, Minor: minor, UID: d.UID, GID: d.GID}
		if d.FileMode != nil {
			mode := *d.FileMode & os.ModePerm
			keep.FileMode = &mode
		}
		out = append(out, keep)
	}
	return out, nil
}

// DeviceRules is the device cgroup of a container: nothing, then libcontainer's defaults (which specconv adds), then
// the extra devices. The host's own rules are not read: they name the host's devices.
func DeviceRules(extra []specs.LinuxDevice) []specs.LinuxDeviceCgroup {
	rules := []specs.LinuxDeviceCgroup{{Allow: false, Access: "rwm"}}
	for i := range extra {
		d := &extra[i]
		rules = append(rules, specs.LinuxDeviceCgroup{Allow: true, Type: d.Type, Major: &d.Major, Minor: &d.Minor, Access: "rwm"})
	}
	return rules
}
