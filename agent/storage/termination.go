// SPDX-License-Identifier: Apache-2.0

package storage

import (
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"

	"github.com/cloister-project/cloister/agent-protocol/wire"
)

// TerminationMessage returns the end of a container's termination log, at most wire.MaxTerminationMessage bytes; nothing if it has
// none. The container has the file by a bind mount and can write what it likes, but put nothing else in its place.
func (s *Store) TerminationMessage(containerID string) ([]byte, error) {
	s.mu.Lock()
	path := ""
	if c := s.containers[containerID]; c != nil {
		path = c.terminationLog
	}
	s.mu.Unlock()
	if path == "" {
		return nil, nil
	}
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("termination log: %w", err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("termination log: %w", err)
	}
	const most = wire.MaxTerminationMessage
	message, err := io.ReadAll(io.NewSectionReader(f, max(0, info.Size()-most), most))
	if err != nil {
		return nil, fmt.Errorf("termination log: %w", err)
	}
	return message, nil
}
