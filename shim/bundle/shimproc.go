// SPDX-License-Identifier: Apache-2.0

package bundle

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/errdefs"

	"github.com/cloister-project/cloister/internal/procid"
)

// killBudget is how long the daemon may take to disappear after SIGKILL.
const killBudget = time.Second

// shimProcess is a procid.Ref as the bundle keeps it, and what goes with it. Bundles of running pods outlive an upgrade of
// the shim: the form stays.
type shimProcess struct {
	PID       int    `json:"pid"`
	StartTime uint64 `json:"startTime"`
	// Sockets that it listens on, as "unix://<path>".
	Sockets []string `json:"sockets,omitempty"`
}

// WriteShim keeps who serves the bundle's pod, and where.
func WriteShim(dir string, pid int, sockets ...string) error {
	ref, err := procid.Of(pid)
	if err != nil {
		return err
	}
	return writeJSON(filepath.Join(dir, shimFile), shimProcess{ref.PID, ref.Start, sockets})
}

// ForgetShim makes EndShim on the bundle do nothing: the daemon lives on for others.
func ForgetShim(dir string) error {
	if err := os.Remove(filepath.Join(dir, shimFile)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// EndShim waits up to grace for the daemon of the bundle's pod to end by itself, as it does after Shutdown, and kills
// it then. containerd runs `delete` for a pod that is to go, whether or not the daemon still answers. Sockets that the
// daemon left are removed.
func EndShim(ctx context.Context, dir string, grace time.Duration) error {
	var p shimProcess
	if err := readJSON(filepath.Join(dir, shimFile), maxSmallBytes, &p); err != nil {
		if errdefs.IsNotFound(err) {
			return nil
		}
		return err
	}
	if err := p.end(ctx, grace); err != nil {
		return err
	}
	var errs []error
	for _, socket := range p.Sockets {
		if err := os.Remove(strings.TrimPrefix(socket, "unix://")); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, fmt.Errorf("remove the shim's socket: %w", err))
		}
	}
	return errors.Join(errs...)
}

func (p shimProcess) end(ctx context.Context, grace time.Duration) error {
	if p.PID <= 1 || p.PID == os.Getpid() {
		return nil
	}
	daemon, err := procid.Ref{PID: p.PID, Start: p.StartTime}.Open()
	if errors.Is(err, os.ErrProcessDone) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("the shim's process: %w", err)
	}
	defer daemon.Close()
	ctx, cancel := context.WithTimeout(ctx, grace+killBudget)
	defer cancel()
	if _, err := daemon.End(ctx, grace); err != nil {
		return fmt.Errorf("end the shim's process: %w", err)
	}
	return nil
}
