// SPDX-License-Identifier: Apache-2.0

package idmap

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"
	"syscall"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// maxExtents is how many lines a map has at most (user_namespaces(7)).
const maxExtents = 340

// Map is the users and the groups of a namespace, each as containerd writes them in a snapshotter's options: "inside:outside:length",
// further ones after commas. Equal ones are the same map. The zero Map is none.
type Map struct{ UIDs, GIDs string }

// Of returns the map of a specification's uidMappings and gidMappings.
func Of(uids, gids []specs.LinuxIDMapping) Map { return Map{list(uids), list(gids)} }

func list(mappings []specs.LinuxIDMapping) string {
	extents := make([]string, 0, len(mappings))
	for _, m := range mappings {
		extents = append(extents, fmt.Sprintf("%d:%d:%d", m.ContainerID, m.HostID, m.Size))
	}
	return strings.Join(extents, ",")
}

// IsZero reports whether it is no map.
func (m Map) IsZero() bool { return m == Map{} }

// Open makes a user namespace that has the map. It needs CAP_SYS_ADMIN, and a program in /proc/self/exe that its users may execute.
// The error is errdefs.ErrInvalidArgument for a map that makes no sense.
func (m Map) Open() (namespace *os.File, err error) {
	uids, err := extents(m.UIDs)
	if err != nil {
		return nil, fmt.Errorf("uid map: %w", err)
	}
	gids, err := extents(m.GIDs)
	if err != nil {
		return nil, fmt.Errorf("gid map: %w", err)
	}
	// Tracing belongs to a thread. The process stops when it begins to execute, and ends with the thread at the latest.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	pidfd := -1
	p, err := os.StartProcess("/proc/self/exe", []string{"namespace"}, &os.ProcAttr{Sys: &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWUSER, UidMappings: uids, GidMappings: gids, GidMappingsEnableSetgroups: true,
		Ptrace: true, Pdeathsig: unix.SIGKILL, PidFD: &pidfd,
	}})
	if err != nil {
		return nil, fmt.Errorf("make a user namespace with %s: %w", m, err)
	}
	defer p.Release() // what it keeps open; end waits
	if pidfd < 0 {
		return nil, errors.Join(fmt.Errorf("the kernel has no process descriptors: %w", errdefs.ErrFailedPrecondition), p.Kill())
	}
	defer unix.Close(pidfd)
	namespace, err = os.Open(fmt.Sprintf("/proc/%d/ns/user", p.Pid)) // it is not reaped before end
	if eerr := end(pidfd); eerr != nil {
		_ = namespace.Close() // of nil too
		return nil, errors.Join(err, eerr)
	}
	return namespace, err
}

// end kills a process that is traced, and reaps it.
func end(pidfd int) error {
	if err := unix.PidfdSendSignal(pidfd, unix.SIGKILL, nil, 0); err != nil {
		return fmt.Errorf("end a process: %w", err)
	}
	for {
		var info unix.Siginfo
		err := unix.Waitid(unix.P_PIDFD, pidfd, &info, unix.WEXITED, nil)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return fmt.Errorf("wait for a process: %w", err)
		case info.Code != cldTrapped && info.Code != cldStopped: // a stop is told as well of what is traced
			return nil
		}
	}
}

// From asm-generic/siginfo.h.
const (
	cldTrapped = 4
	cldStopped = 5
)

func (m Map) String() string { return fmt.Sprintf("uids %s and gids %s", m.UIDs, m.GIDs) }

func extents(text string) ([]syscall.SysProcIDMap, error) {
	lines := strings.Split(text, ",")
	if len(lines) > maxExtents {
		return nil, fmt.Errorf("it has %d lines, the limit is %d: %w", len(lines), maxExtents, errdefs.ErrInvalidArgument)
	}
	out := make([]syscall.SysProcIDMap, 0, len(lines))
	for _, line := range lines {
		var numbers []int
		for field := range strings.SplitSeq(line, ":") {
			n, err := strconv.ParseUint(field, 10, 32)
			if err != nil {
				return nil, fmt.Errorf("%.40q is not inside:outside:length: %w", line, errdefs.ErrInvalidArgument)
			}
			numbers = append(numbers, int(n))
		}
		if len(numbers) != 3 || numbers[2] == 0 {
			return nil, fmt.Errorf("%.40q is not inside:outside:length: %w", line, errdefs.ErrInvalidArgument)
		}
		out = append(out, syscall.SysProcIDMap{ContainerID: numbers[0], HostID: numbers[1], Size: numbers[2]})
	}
	return out, nil
}
