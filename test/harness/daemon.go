// SPDX-License-Identifier: Apache-2.0

package harness

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"syscall"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// stopBudget is how long containerd may take for an orderly end before it is killed.
const stopBudget = 10 * time.Second

// pollInterval is how often something is asked that cannot tell by itself when it is done.
const pollInterval = 50 * time.Millisecond

// daemon is a child process that is waited for by one goroutine; done is closed when it has ended.
type daemon struct {
	cmd  *exec.Cmd
	done chan struct{}
	err  error // valid after done
}

func startDaemon(cmd *exec.Cmd, logPath string) (*daemon, error) {
	logFile, err := os.OpenFile(logPath, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	defer logFile.Close()
	cmd.Stdout, cmd.Stderr = logFile, logFile
	// A session of its own: Ctrl-C at the terminal is for us, who then stop it in order; and it can be kept.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	d := &daemon{cmd: cmd, done: make(chan struct{})}
	go func() {
		d.err = cmd.Wait()
		close(d.done)
	}()
	return d, nil
}

// stop ends the process and waits for it; hard is SIGKILL at once.
func (d *daemon) stop(ctx context.Context, hard bool) error {
	if !hard {
		if err := d.cmd.Process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
			return err
		}
		ctx, cancel := context.WithTimeout(ctx, stopBudget)
		defer cancel()
		select {
		case <-d.done:
			return nil
		case <-ctx.Done():
		}
	}
	if err := d.cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	<-d.done
	return nil
}

// awaitReady asks the CRI until runtime and network are ready, containerd has died, or ctx ends.
func (n *Node) awaitReady(ctx context.Context, d *daemon) error {
	ticker := time.NewTicker(pollInterval)
	defer ticker.Stop()
	var last error
	for {
		status, err := n.cri.Runtime.Status(ctx, &runtimeapi.StatusRequest{})
		if err != nil {
			last = err
		} else if last = notReady(status.GetStatus()); last == nil {
			return nil
		}
		select {
		case <-d.done:
			return fmt.Errorf("it ended: %w", d.err)
		case <-ctx.Done():
			return fmt.Errorf("%w: %w", ctx.Err(), last)
		case <-ticker.C:
		}
	}
}

func notReady(status *runtimeapi.RuntimeStatus) error {
	for _, c := range status.GetConditions() {
		if !c.GetStatus() && (c.GetType() == runtimeapi.RuntimeReady || c.GetType() == runtimeapi.NetworkReady) {
			return fmt.Errorf("%s is false: %s: %s", c.GetType(), c.GetReason(), c.GetMessage())
		}
	}
	return nil
}
