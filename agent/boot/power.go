// SPDX-License-Identifier: Apache-2.0

package boot

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/cloister-project/cloister/internal/procid"
)

// How long processes get to end at power-off. The init of a pid namespace that does not handle SIGTERM ignores it, so
// that the first budget is often used up; containers that were stopped in order before do not pay it.
const (
	termBudget = 200 * time.Millisecond
	killBudget = 2 * time.Second
)

// PowerOff ends every process, writes back and unmounts what is mounted, and turns the guest off. It does not return.
func (s *System) PowerOff() {
	s.powerOff.Do(func() {
		endProcesses(unix.SIGTERM, termBudget)
		endProcesses(unix.SIGKILL, killBudget)
		unix.Sync()
		unmountAll()
		unix.Sync()
		err := unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
		// PID 1 that exits makes the kernel panic: the VM ends too, less nicely.
		fmt.Fprintln(os.Stderr, "cloister-agent: power off:", err)
		os.Exit(1)
	})
	select {} // another caller is at it
}

// endProcesses sends a signal to all processes but this one and waits until they are gone, at most for budget.
func endProcesses(signal unix.Signal, budget time.Duration) {
	deadline := time.Now().Add(budget)
	for {
		pids := userProcesses()
		if len(pids) == 0 {
			return
		}
		var polled []unix.PollFd
		for _, pid := range pids {
			fd, err := unix.PidfdOpen(pid, 0)
			if err != nil {
				continue // gone meanwhile
			}
			defer unix.Close(fd)
			_ = unix.PidfdSendSignal(fd, signal, nil, 0)
			polled = append(polled, unix.PollFd{Fd: int32(fd), Events: unix.POLLIN})
		}
		for len(polled) > 0 {
			left := time.Until(deadline)
			if left <= 0 {
				return
			}
			if _, err := unix.Poll(polled, int(left.Milliseconds())+1); err != nil && err != unix.EINTR {
				return
			}
			alive := polled[:0]
			for _, p := range polled {
				if p.Revents == 0 {
					alive = append(alive, p)
				}
			}
			polled = alive
		}
		// Some may have forked between the listing and the signal: look again.
	}
}

// userProcesses lists the processes that are neither this one nor threads of the kernel nor dead.
func userProcesses() []int {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil
	}
	var pids []int
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		stat, err := procid.ReadStat(pid)
		if err == nil && !stat.KernelThread() && !stat.Ended() {
			pids = append(pids, pid)
		}
	}
	return pids
}

// unmountAll unmounts, the last first, what can hold data. The kernel's own file systems stay for the steps after it.
func unmountAll() {
	mounts, err := mountinfo.GetMounts(nil)
	if err != nil {
		fmt.Fprintln(os.Stderr, "cloister-agent: list mounts at power-off:", err)
		return
	}
	for i := len(mounts) - 1; i >= 0; i-- {
		m := mounts[i]
		if m.Mountpoint == "/" || !strings.HasPrefix(m.Mountpoint, "/run/") {
			continue
		}
		_ = unix.Unmount(m.Mountpoint, unix.UMOUNT_NOFOLLOW)
	}
}
