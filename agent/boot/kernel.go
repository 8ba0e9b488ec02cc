// SPDX-License-Identifier: Apache-2.0

package boot

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"
)

// hostSysctls make the kernel a container host; the values are those that kubelet (protectKernelDefaults) and
// containerd's documentation ask of a node, and limits that a small VM's kernel sets too low for many containers.
var hostSysctls = []struct{ key, value string }{
	{"kernel.panic_on_oops", "1"},
	{"kernel.keys.root_maxkeys", "1000000"},
	{"kernel.keys.root_maxbytes", "25000000"},
	{"kernel.pid_max", "4194304"},
	{"kernel.kptr_restrict", "1"},
	{"vm.overcommit_memory", "1"},
	{"vm.panic_on_oom", "0"},
	{"vm.max_map_count", "262144"},
	{"fs.inotify.max_user_instances", "8192"},
	{"fs.inotify.max_user_watches", "524288"},
	{"fs.protected_hardlinks", "1"},
	{"fs.protected_symlinks", "1"},
	// Every group may ping, as containerd sets it for pods (enable_unprivileged_icmp).
	{"net.ipv4.ping_group_range", "0 2147483647"},
	// The pod is an end point, never a router.
	{"net.ipv4.ip_forward", "0"},
	{"net.ipv6.conf.all.forwarding", "0"},
}

// setupKernel sets the kernel's parameters and what containers inherit from the agent. A parameter that this kernel
// does not have is only noted.
func setupKernel(ctx context.Context) error {
	tree, err := openSysctls()
	if err != nil {
		return err
	}
	defer tree.Close()
	for _, p := range hostSysctls {
		err := writeSysctl(tree, p.key, p.value)
		if errors.Is(err, os.ErrNotExist) {
			log.G(ctx).WithField("sysctl", p.key).Debug("this kernel has no such parameter")
			continue
		}
		if err != nil {
			return err
		}
	}
	// Containers without limits of their own get these, as under systemd.
	for _, l := range []struct {
		resource int
		limit    unix.Rlimit
	}{
		{unix.RLIMIT_NOFILE, unix.Rlimit{Cur: 1024, Max: 1 << 20}},
		{unix.RLIMIT_NPROC, unix.Rlimit{Cur: unix.RLIM_INFINITY, Max: unix.RLIM_INFINITY}},
		{unix.RLIMIT_CORE, unix.Rlimit{Cur: 0, Max: unix.RLIM_INFINITY}},
	} {
		if err := unix.Setrlimit(l.resource, &l.limit); err != nil {
			return fmt.Errorf("set resource limit %d: %w", l.resource, err)
		}
	}
	return nil
}

// newMemory says what the kernel does with memory that is plugged in: Documentation/admin-guide/mm/memory-hotplug.rst of
// Linux, "Memory Hotplug Sysfs Files".
const newMemory = "/sys/devices/system/memory/auto_online_blocks"

// refuseMemory keeps a confidential guest from taking memory that the host plugs in later; processors wait to be taken
// anyway. A kernel without the file takes none.
func refuseMemory(path string) error {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("refuse memory that the host plugs in: %w", err)
	}
	if _, err := f.WriteString("offline"); err != nil {
		return fmt.Errorf("refuse memory that the host plugs in: %w", errors.Join(err, f.Close()))
	}
	return f.Close()
}

// oldestClock is the earliest wall clock time that SetClock takes.
var oldestClock = time.Date(2020, 1, 1, 0, 0, 0, 0, time.UTC)

// latestClock keeps clear of the end of 64-bit nanoseconds (2262), where timers of programs would overflow.
var latestClock = time.Date(2200, 1, 1, 0, 0, 0, 0, time.UTC)

// clockTolerance is how far off the clock may be before SetClock steps it: the way from the host alone takes some time,
// and programs do not like steps.
const clockTolerance = 200 * time.Millisecond

// SetClock sets the guest's wall clock, in nanoseconds since 1970-01-01 UTC; one that is nearly right is left alone.
// errdefs.ErrInvalidArgument for a time that cannot be now.
func (s *System) SetClock(unixNanos int64) error {
	if t := time.Unix(0, unixNanos); t.Before(oldestClock) || t.After(latestClock) {
		return fmt.Errorf("set the clock to %d ns since 1970: not between %s and %s: %w",
			unixNanos, oldestClock.Format(time.DateOnly), latestClock.Format(time.DateOnly), errdefs.ErrInvalidArgument)
	}
	if d := time.Until(time.Unix(0, unixNanos)); d.Abs() < clockTolerance {
		return nil
	}
	ts := unix.NsecToTimespec(unixNanos)
	if err := unix.ClockSettime(unix.CLOCK_REALTIME, &ts); err != nil {
		return fmt.Errorf("set the clock: %w", err)
	}
	return nil
}

// SetHostname sets the hostname of the thread's uts namespace. errdefs.ErrInvalidArgument for what is not a hostname
// of 1 to 64 letters, digits, dots, dashes and underscores.
func (s *System) SetHostname(name string) error {
	if err := checkHostname(name); err != nil {
		return err
	}
	if err := unix.Sethostname([]byte(name)); err != nil {
		return fmt.Errorf("set hostname %q: %w", name, err)
	}
	return nil
}

func checkHostname(name string) error {
	const longest = 64 // __NEW_UTS_LEN
	ok := len(name) >= 1 && len(name) <= longest && name[0] != '-' && name[0] != '.'
	for _, c := range []byte(name) {
		ok = ok && (c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '-' || c == '.' || c == '_')
	}
	if !ok {
		return fmt.Errorf("hostname %.80q is not 1 to %d of [A-Za-z0-9._-]: %w", name, longest, errdefs.ErrInvalidArgument)
	}
	return nil
}
