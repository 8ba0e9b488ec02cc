// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/cloister-project/cloister/tools/stages"
)

const (
	// grace is how long programs have for an end in order.
	grace = 10 * time.Second
	// pollInterval is how often it is asked whether a process group is empty: nothing tells of it.
	pollInterval = 20 * time.Millisecond
)

// errOther ends a step because another one failed; it is not worth a word of its own.
var errOther = errors.New("another step failed")

// perform runs the background steps at once, as soon as what they wait for has ended, and the others one after another.
// When it returns, no process of any step is left.
func perform(ctx context.Context, progress *stages.Progress, steps []step) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var waiters sync.WaitGroup
	defer waiters.Wait()
	defer cancel(errOther)

	watched, unwatch := context.WithCancel(context.WithoutCancel(ctx))
	defer unwatch()
	waiters.Go(func() { progress.Watch(watched) })

	done := map[string]chan struct{}{}
	for _, s := range steps {
		if s.background {
			done[s.name] = make(chan struct{})
		}
	}
	// A step that failed never closes its channel, but ends ctx.
	await := func(s step) error {
		for _, name := range s.after {
			select {
			case <-done[name]:
			case <-ctx.Done():
				return context.Cause(ctx)
			}
		}
		return nil
	}
	for _, s := range steps {
		if !s.background {
			continue
		}
		waiters.Go(func() {
			err := await(s)
			if err == nil {
				err = runStep(ctx, progress, s)
			}
			if err != nil {
				cancel(err)
				return
			}
			close(done[s.name])
		})
	}
	for _, s := range steps {
		if s.background {
			continue
		}
		err := await(s)
		if err == nil {
			err = runStep(ctx, progress, s)
		}
		if err != nil {
			cancel(err) // the first one counts
			return context.Cause(ctx)
		}
	}
	return await(step{after: slices.Collect(maps.Keys(done))})
}

// runStep runs a step's command; its error names the step.
func runStep(ctx context.Context, progress *stages.Progress, s step) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	running := progress.Begin(s.name, s.estimate, s.background)
	shown := running.Output()
	var held bytes.Buffer
	var out io.Writer = shown
	if s.background {
		if out = &held; s.show {
			out = io.MultiWriter(shown, &held)
		}
	}
	err := runGroup(ctx, s.command, out)
	err = errors.Join(err, shown.Close())
	if ctx.Err() != nil {
		running.Stop()
		return context.Cause(ctx)
	}
	if err != nil {
		running.Fail(held.String())
		return fmt.Errorf("%s: %s: %w; its output is above", s.name, strings.Join(s.command, " "), err)
	}
	running.End("")
	return nil
}

// runGroup runs a command in a process group of its own. If ctx ends, so does everything in the group before it returns.
// Otherwise it does not look for processes that the command left: they may be daemons of packages that were installed.
func runGroup(ctx context.Context, command []string, out io.Writer) error {
	cmd := exec.CommandContext(ctx, command[0], command[1:]...)
	cmd.Env = environment()
	cmd.Stdout, cmd.Stderr = out, out
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGTERM) }
	cmd.WaitDelay = grace
	if err := cmd.Start(); err != nil {
		return err
	}
	err := cmd.Wait()
	if ctx.Err() != nil {
		err = errors.Join(err, emptyGroup(cmd.Process.Pid))
	}
	return err
}

// emptyGroup waits until a process group that was sent SIGTERM is empty, and kills what is left after the time of grace.
func emptyGroup(group int) error {
	ticker := time.NewTicker(pollInterval)
	defer ticker.Stop()
	signal := syscall.Signal(0)
	for started := time.Now(); ; <-ticker.C {
		err := syscall.Kill(-group, signal)
		if errors.Is(err, syscall.ESRCH) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("ending process group %d: %w", group, err)
		}
		if waited := time.Since(started); waited > 2*grace {
			return fmt.Errorf("process group %d is still there after SIGKILL", group)
		} else if waited > grace {
			signal = syscall.SIGKILL
		}
	}
}

// environment is this process's, less what make told it: that is not for another make.
func environment() []string {
	return slices.DeleteFunc(os.Environ(), func(e string) bool {
		return strings.HasPrefix(e, "MAKEFLAGS=") || strings.HasPrefix(e, "MAKELEVEL=") || strings.HasPrefix(e, "MFLAGS=")
	})
}
