// SPDX-License-Identifier: Apache-2.0

package ocispec

import (
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Guest is what the allow-list knows about the machine that it runs in. It never learns it from a request.
type Guest struct {
	// Cgroup is the parent of the containers' cgroups.
	Cgroup string
	// IPC, UTS and PID are paths of the namespaces that a container may join, the pod's own or, for PID, another container's;
	// empty for one that there is not.
	IPC, UTS, PID string

	// cpus returns the number of the highest online CPU plus one; more come when the host plugs them in.
	cpus func() int
	// nrOpen is fs.nr_open, the ceiling of RLIMIT_NOFILE.
	nrOpen uint64
	// device finds a character device of the guest by its path.
	device func(path string) (major, minor int64, ok bool)
}

// Inspect reads what the allow-list needs from the running guest. The pod's part, Cgroup and the namespaces, is the
// caller's to fill in.
func Inspect() *Guest {
	g := &Guest{cpus: onlineCPUs, device: statDevice}
	if raw, err := os.ReadFile("/proc/sys/fs/nr_open"); err == nil {
		g.nrOpen, _ = strconv.ParseUint(strings.TrimSpace(string(raw)), 10, 64)
	}
	return g
}

func onlineCPUs() int {
	raw, err := os.ReadFile("/sys/devices/system/cpu/online")
	if err != nil {
		return 0
	}
	list := strings.TrimSpace(string(raw))
	last := list[strings.LastIndexAny(list, ",-")+1:]
	n, err := strconv.Atoi(last)
	if err != nil {
		return 0
	}
	return n + 1
}

func statDevice(path string) (major, minor int64, ok bool) {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFCHR {
		return 0, 0, false
	}
	return int64(unix.Major(st.Rdev)), int64(unix.Minor(st.Rdev)), true
}
