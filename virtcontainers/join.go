// SPDX-License-Identifier: Apache-2.0

package virtcontainers

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
)

// joined looks at the pid, ipc and uts namespaces that a container joins by path, which must be the pod's or those of another
// container in it. It returns the container whose pid namespace is meant, none if that is the pod's own, and the reasons for
// which others are refused. A pod that is nil has none of them.
func (p *Pod) joined(l *specs.Linux) (pidTarget string, reasons []string) {
	if l == nil {
		return "", nil
	}
	for _, ns := range l.Namespaces {
		if ns.Path == "" {
			continue
		}
		switch ns.Type {
		case specs.PIDNamespace, specs.IPCNamespace, specs.UTSNamespace:
		default:
			continue // the network's is the pod's anyway, and others are the container's own
		}
		owner, ok := p.owner(ns)
		if !ok {
			reasons = append(reasons, fmt.Sprintf("%s namespace %s: leave it out, or name a running container of the same pod: that is none, "+
				"and a VM shares no namespace with the host or with another pod", ns.Type, ns.Path))
		}
		if ns.Type == specs.PIDNamespace {
			pidTarget = owner
		}
	}
	return pidTarget, reasons
}

// owner finds the pod or the container whose namespace it is by the process id in its path, which is all that clients of
// containerd know of it. It is empty for the pod.
func (p *Pod) owner(ns specs.LinuxNamespace) (container string, ok bool) {
	pid, ok := strings.CutPrefix(ns.Path, "/proc/")
	if ok {
		pid, ok = strings.CutSuffix(pid, "/ns/"+string(ns.Type))
	}
	n, err := strconv.ParseUint(pid, 10, 32)
	if !ok || err != nil || n == 0 || p == nil {
		return "", false
	}
	if uint32(n) == p.vmPID() {
		return "", true
	}
	for _, c := range p.Containers() {
		// A process id is used again once the container has ended.
		if c.pid() == uint32(n) && c.init.State().Status != ProcessStopped {
			return c.id, true
		}
	}
	return "", false
}
