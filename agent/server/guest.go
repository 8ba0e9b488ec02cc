// SPDX-License-Identifier: Apache-2.0

package server

import (
	"bytes"
	"fmt"
	"os"
	"strconv"

	"golang.org/x/sys/unix"

	agentv1 "github.com/cloister-project/cloister/agent-protocol/v1"
)

// readGuestStats fills in what is known of the guest as a whole.
func readGuestStats() (*agentv1.SandboxStatsResponse, error) {
	info, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return nil, fmt.Errorf("read the guest's memory: %w", err)
	}
	statm, err := os.ReadFile("/proc/self/statm")
	if err != nil {
		return nil, fmt.Errorf("read the agent's memory: %w", err)
	}
	out := &agentv1.SandboxStatsResponse{
		MemoryTotal:     meminfo(info, "MemTotal:"),
		MemoryAvailable: meminfo(info, "MemAvailable:"),
	}
	// The second field of statm is the resident set in pages, see proc_pid_statm(5).
	if fields := bytes.Fields(statm); len(fields) > 1 {
		pages, _ := strconv.ParseUint(string(fields[1]), 10, 64)
		out.AgentRss = pages * uint64(os.Getpagesize())
	}
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &now); err != nil {
		return nil, err
	}
	out.UptimeMicros = uint64(now.Nano()) / 1000
	return out, nil
}

// meminfo finds a value of /proc/meminfo, in bytes.
func meminfo(raw []byte, key string) uint64 {
	for _, line := range bytes.Split(raw, []byte("\n")) {
		rest, ok := bytes.CutPrefix(line, []byte(key))
		if !ok {
			continue
		}
		kib, _ := strconv.ParseUint(string(bytes.TrimSuffix(bytes.TrimSpace(rest), []byte(" kB"))), 10, 64)
		return kib << 10
	}
	return 0
}
