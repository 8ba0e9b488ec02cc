// SPDX-License-Identifier: Apache-2.0

package procid

import (
	"bytes"
	"fmt"
	"os"
	"strconv"
)

// Stat is what is read of /proc/PID/stat, see proc_pid_stat(5).
type Stat struct {
	// State is a letter, such as 'S' for a process that sleeps.
	State byte
	// Flags are the kernel's PF_* bits.
	Flags uint64
	// Start is when the process started, in clock ticks since the machine did.
	Start uint64
}

// Ended reports whether the process is a zombie, or just being removed.
func (s Stat) Ended() bool { return s.State == 'Z' || s.State == 'X' }

// KernelThread reports whether it is a thread of the kernel.
func (s Stat) KernelThread() bool {
	const kernelThread = 0x00200000 // PF_KTHREAD
	return s.Flags&kernelThread != 0
}

// ReadStat reads the stat file of a process.
func ReadStat(pid int) (Stat, error) {
	path := fmt.Sprintf("/proc/%d/stat", pid)
	data, err := os.ReadFile(path)
	if err != nil {
		return Stat{}, err
	}
	s, err := parseStat(data)
	if err != nil {
		return Stat{}, fmt.Errorf("%s: %w", path, err)
	}
	return s, nil
}

// parseStat counts fields from behind the last bracket: the second field, the process's name, is in brackets and may
// hold anything, brackets and spaces included.
func parseStat(data []byte) (Stat, error) {
	_, rest, found := bytes.Cut(data[max(0, bytes.LastIndexByte(data, ')')):], []byte(") "))
	fields := bytes.Fields(rest) // from field 3, the state, on
	if !found || len(fields) < 20 || len(fields[0]) != 1 {
		return Stat{}, fmt.Errorf("unknown format")
	}
	s := Stat{State: fields[0][0]}
	var err error
	if s.Flags, err = strconv.ParseUint(string(fields[6]), 10, 64); err != nil {
		return Stat{}, fmt.Errorf("flags: %w", err)
	}
	if s.Start, err = strconv.ParseUint(string(fields[19]), 10, 64); err != nil {
		return Stat{}, fmt.Errorf("start time: %w", err)
	}
	return s, nil
}

// Alive reports whether pid is the pid of a process that has not ended. A zombie has, whoever is to reap it may take its
// time.
func Alive(pid int) bool {
	s, err := ReadStat(pid)
	return err == nil && !s.Ended()
}
