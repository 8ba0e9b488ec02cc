// SPDX-License-Identifier: Apache-2.0

package boot

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/cloister-project/cloister/agent/uevent"
)

// cpuRoot is where the kernel shows its CPUs (Documentation/admin-guide/cputopology.rst).
const cpuRoot = "/sys/devices/system/cpu"

// OnlineCPUs brings CPUs online until there are so many, as they come, at most until ctx ends. No CPU goes offline.
func (s *System) OnlineCPUs(ctx context.Context, count int) error {
	events, err := uevent.Listen()
	if err != nil {
		return err
	}
	defer events.Close()
	online := 0
	err = events.Await(ctx, "cpu", func() (bool, error) {
		online, err = onlineCPUs(cpuRoot, count)
		return online >= count, err
	})
	if err != nil {
		return fmt.Errorf("%d of %d CPUs are online: %w", online, count, err)
	}
	return nil
}

// onlineCPUs switches CPUs on that are off, while there are fewer than count, and returns how many are on.
func onlineCPUs(root string, count int) (online int, err error) {
	paths, err := filepath.Glob(filepath.Join(root, "cpu[0-9]*"))
	if err != nil {
		return 0, err
	}
	var off []string
	for _, path := range paths {
		// The first CPU has no such file where it cannot be switched off.
		state, err := os.ReadFile(filepath.Join(path, "online"))
		switch {
		case os.IsNotExist(err) || err == nil && strings.TrimSpace(string(state)) == "1":
			online++
		case err != nil:
			return online, err
		default:
			off = append(off, path)
		}
	}
	for _, path := range off {
		if online >= count {
			break
		}
		if err := os.WriteFile(filepath.Join(path, "online"), []byte("1"), 0); err != nil {
			return online, fmt.Errorf("switch %s on: %w", filepath.Base(path), err)
		}
		online++
	}
	return online, nil
}
