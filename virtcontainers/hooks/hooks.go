// SPDX-License-Identifier: Apache-2.0

package hooks

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

const (
	// maxHooks bounds the hooks of a container.
	maxHooks = 256
	// tailBytes is how much of a hook's output goes into an error.
	tailBytes = 4 << 10
	// lingering is how long output is read after a hook has ended, if somebody it started still holds the pipe.
	lingering = 500 * time.Millisecond
	// reaping is how long the killed group of a hook may take to end.
	reaping = 2 * time.Second
)

// Error is the failure of one hook.
type Error struct {
	// Phase is the hook's name in the OCI spec ("createRuntime") and Index its place there, from 0.
	Phase string
	Index int
	// Path is the hook's program.
	Path string
	// Err is an *exec.ExitError, what starting the program gave, or the context's error. It wraps
	// context.DeadlineExceeded for a hook that passed its own time limit.
	Err error
	// Output is the end of what the hook wrote to standard error, or, where that is nothing, to standard output.
	Output string
}

func (e *Error) Error() string {
	s := fmt.Sprintf("OCI hook %s[%d] %s: %v", e.Phase, e.Index, e.Path, e.Err)
	if e.Output != "" {
		s += fmt.Sprintf("; it wrote: %q", e.Output)
	}
	return s
}

func (e *Error) Unwrap() error { return e.Err }

// UnsupportedError lists the hooks that would have to run in the guest. It is an errdefs.ErrNotImplemented.
type UnsupportedError struct {
	// Hooks are "createContainer[0] /usr/bin/x" and the like.
	Hooks []string
}

func (e *UnsupportedError) Error() string {
	return "OCI hooks that run inside the container are not supported: " + strings.Join(e.Hooks, ", ") +
		": their programs are files of the host, and the container is in a virtual machine; " +
		"use createRuntime, poststart or poststop hooks, or put the program into the image"
}

// Unwrap makes errdefs.IsNotImplemented true.
func (e *UnsupportedError) Unwrap() error { return errdefs.ErrNotImplemented }

// Validate refuses createContainer and startContainer hooks with an *UnsupportedError, and hooks that are not as
// runtime-spec wants them (relative path, time limit of 0 or less) with an errdefs.ErrInvalidArgument. Nil hooks are
// fine.
func Validate(h *specs.Hooks) error {
	if h == nil {
		return nil
	}
	unsupported := &UnsupportedError{}
	for _, phase := range []struct {
		name  string
		hooks []specs.Hook
	}{{"createContainer", h.CreateContainer}, {"startContainer", h.StartContainer}} {
		for i, hook := range phase.hooks {
			if len(unsupported.Hooks) == maxHooks {
				break
			}
			unsupported.Hooks = append(unsupported.Hooks, fmt.Sprintf("%s[%d] %s", phase.name, i, hook.Path))
		}
	}
	if len(unsupported.Hooks) > 0 {
		return unsupported
	}
	var errs []error
	total := 0
	for _, phase := range []struct {
		name  string
		hooks []specs.Hook
	}{{"prestart", prestart(h)}, {"createRuntime", h.CreateRuntime}, {"poststart", h.Poststart}, {"poststop", h.Poststop}} {
		total += len(phase.hooks)
		for i, hook := range phase.hooks {
			if !filepath.IsAbs(hook.Path) {
				errs = append(errs, fmt.Errorf("OCI hook %s[%d]: path %q is not absolute: %w", phase.name, i, hook.Path, errdefs.ErrInvalidArgument))
			}
			if hook.Timeout != nil && *hook.Timeout <= 0 {
				errs = append(errs, fmt.Errorf("OCI hook %s[%d] %s: timeout %d is not greater than zero: %w", phase.name, i, hook.Path, *hook.Timeout,
					errdefs.ErrInvalidArgument))
			}
		}
	}
	if total > maxHooks {
		return fmt.Errorf("%d OCI hooks; the limit is %d: %w", total, maxHooks, errdefs.ErrInvalidArgument)
	}
	return errors.Join(errs...)
}

// prestart is deprecated in runtime-spec, but nvidia's and other tools still write it.
func prestart(h *specs.Hooks) []specs.Hook {
	//lint:ignore SA1019 see above
	return h.Prestart
}

// CreateRuntime runs the prestart and then the createRuntime hooks, in order, with status "creating". The first failure
// ends it with an *Error.
func CreateRuntime(ctx context.Context, h *specs.Hooks, state specs.State) error {
	if h == nil {
		return nil
	}
	state.Status = specs.StateCreating
	if err := runAll(ctx, "prestart", prestart(h), state); err != nil {
		return err
	}
	return runAll(ctx, "createRuntime", h.CreateRuntime, state)
}

func runAll(ctx context.Context, phase string, hooks []specs.Hook, state specs.State) error {
	for i, hook := range hooks {
		if err := run(ctx, phase, i, hook, state, true); err != nil {
			return err
		}
	}
	return nil
}

// Poststart runs the poststart hooks in order, with status "running". Failures are logged, and the next hook runs.
func Poststart(ctx context.Context, h *specs.Hooks, state specs.State) {
	if h == nil {
		return
	}
	state.Status = specs.StateRunning
	logAll(ctx, "poststart", h.Poststart, state, true)
}

// Poststop runs the poststop hooks in order, with status "stopped". Failures are logged, and the next hook runs.
func Poststop(ctx context.Context, h *specs.Hooks, state specs.State) {
	if h == nil {
		return
	}
	state.Status = specs.StateStopped
	logAll(ctx, "poststop", h.Poststop, state, false)
}

func logAll(ctx context.Context, phase string, hooks []specs.Hook, state specs.State, dieWithShim bool) {
	for i, hook := range hooks {
		if err := run(ctx, phase, i, hook, state, dieWithShim); err != nil {
			log.G(ctx).WithError(err).WithField("id", state.ID).Warn("OCI hook failed")
		}
	}
}

// run runs one hook to its end.
func run(ctx context.Context, phase string, index int, hook specs.Hook, state specs.State, dieWithShim bool) error {
	fail := func(err error, output string) error {
		return &Error{Phase: phase, Index: index, Path: hook.Path, Err: err, Output: output}
	}
	stdin, err := json.Marshal(state)
	if err != nil {
		return fail(fmt.Errorf("encode the container's state: %w", err), "")
	}
	hookCtx, cancel := ctx, func() {}
	if hook.Timeout != nil {
		hookCtx, cancel = context.WithTimeout(ctx, time.Duration(*hook.Timeout)*time.Second)
	}
	defer cancel()

	var stdout, stderr tail
	cmd := exec.CommandContext(hookCtx, hook.Path)
	// args is the whole argv, the name of the program included.
	if len(hook.Args) > 0 {
		cmd.Args = hook.Args
	}
	// Without env a hook inherits the shim's, as runc has it.
	if len(hook.Env) > 0 {
		cmd.Env = hook.Env
	}
	cmd.Dir = state.Bundle
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(stdin), &stdout, &stderr
	cmd.SysProcAttr = &unix.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return unix.Kill(-cmd.Process.Pid, unix.SIGKILL) }
	cmd.WaitDelay = lingering
	if dieWithShim {
		cmd.SysProcAttr.Pdeathsig = unix.SIGKILL
		// The signal comes with the end of the thread that forked, not of the process (golang.org/issue/27505).
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
	}
	err = cmd.Start()
	if err == nil {
		err = cmd.Wait()
		if hookCtx.Err() != nil {
			killGroup(cmd.Process.Pid)
		}
	}
	output := stderr.String()
	if output == "" {
		output = stdout.String()
	}
	switch {
	case err == nil, errors.Is(err, exec.ErrWaitDelay) && hookCtx.Err() == nil:
		// ErrWaitDelay alone: the hook succeeded, but something that it started holds its output open.
		return nil
	case ctx.Err() != nil:
		return fail(fmt.Errorf("was killed: %w", context.Cause(ctx)), output)
	case hookCtx.Err() != nil:
		return fail(fmt.Errorf("did not end within its time limit of %d s and was killed: %w", *hook.Timeout, hookCtx.Err()), output)
	}
	return fail(err, output)
}

// killGroup ends what is left of a hook's process group, and reaps what of it became a child of this process (a shim is
// a subreaper). The leader was reaped already; its id cannot have been given away while the group has members, and if
// it has none, the kill does nothing: a new process gets the id only after 2^22 others.
func killGroup(pgid int) {
	deadline := time.Now().Add(reaping)
	for time.Now().Before(deadline) {
		killErr := unix.Kill(-pgid, unix.SIGKILL)
		pid, err := unix.Wait4(-pgid, nil, unix.WNOHANG, nil)
		switch {
		case pid > 0, errors.Is(err, unix.EINTR):
			continue
		case errors.Is(killErr, unix.ESRCH):
			return
		}
		// Dying, or a zombie of somebody else's. A wait for "any of a group that is not ours" does not exist.
		<-time.After(2 * time.Millisecond)
	}
}

// tail is a writer that keeps the end of what was written.
type tail struct{ buf []byte }

func (t *tail) Write(p []byte) (int, error) {
	n := len(p)
	if n >= tailBytes {
		t.buf = append(t.buf[:0], p[n-tailBytes:]...)
		return n, nil
	}
	if over := len(t.buf) + n - tailBytes; over > 0 {
		t.buf = t.buf[:copy(t.buf, t.buf[over:])]
	}
	t.buf = append(t.buf, p...)
	return n, nil
}

func (t *tail) String() string {
	return strings.ToValidUTF8(strings.TrimSpace(string(t.buf)), "�")
}
