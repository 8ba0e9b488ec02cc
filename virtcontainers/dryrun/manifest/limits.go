// SPDX-License-Identifier: Apache-2.0

package manifest

import (
	"math/big"

	"github.com/opencontainers/runtime-spec/specs-go"
)

// cpuPeriod is the kubelet's, microseconds.
const cpuPeriod = 100000

// Limits that a VM is sized by; everything else that containers can ask for in limits is a device of the host.
const (
	LimitCPU    = "cpu"
	LimitMemory = "memory"
)

// Limits sums up a pod's limits as the kubelet does for its sandbox: containers and sidecars run together, each other init
// container before them, and limits of the pod as a whole count first.
func (s Spec) Limits() *specs.LinuxResources {
	r := &specs.LinuxResources{}
	if memory := s.limit(LimitMemory).times(1); memory > 0 {
		r.Memory = &specs.LinuxMemory{Limit: &memory}
	}
	if milli := s.limit(LimitCPU).times(1000); milli > 0 {
		quota, period := min(milli, 1<<40)*(cpuPeriod/1000), uint64(cpuPeriod)
		r.CPU = &specs.LinuxCPU{Quota: &quota, Period: &period}
	}
	return r
}

func (s Spec) limit(name string) Quantity {
	if q, ok := s.Resources.Limits[name]; ok {
		return q
	}
	sum, before, most := new(big.Rat), new(big.Rat), new(big.Rat)
	for _, c := range s.InitContainers {
		q := c.Resources.Limits[name].value
		if q == nil {
			continue
		}
		if c.RestartPolicy == "Always" {
			sum.Add(sum, q)
			before.Add(before, q)
			q = new(big.Rat)
		}
		if one := new(big.Rat).Add(before, q); one.Cmp(most) > 0 {
			most = one
		}
	}
	for _, c := range s.Containers {
		if q := c.Resources.Limits[name].value; q != nil {
			sum.Add(sum, q)
		}
	}
	if most.Cmp(sum) > 0 {
		sum = most
	}
	return Quantity{sum}
}

// WholeCPUs is a limit of so many whole CPUs.
func WholeCPUs(n int) *specs.LinuxCPU {
	quota, period := int64(n)*cpuPeriod, uint64(cpuPeriod)
	return &specs.LinuxCPU{Quota: &quota, Period: &period}
}
