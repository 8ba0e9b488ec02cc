// SPDX-License-Identifier: Apache-2.0

package supervise

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	"github.com/cloister-project/cloister/hypervisor"
)

// exitGrace is for a VMM to be gone after it has closed a connection to its owner.
const exitGrace = 2 * time.Second

// VM is the part of a hypervisor.VM that is the same for every VMM: its process and logs, how it is stopped, and its end.
// A driver's VM embeds it, sets Proc, and calls Settle when the process is gone and everything else is released.
type VM struct {
	// Name of the VMM for people.
	Name string
	Logs *Logs
	// Proc is nil until the VMM was started.
	Proc *Process

	mu     sync.Mutex
	booted bool
	killed bool // we ended the process, because of cause or by the owner's wish
	cause  string

	done chan struct{}
	exit hypervisor.Exit // valid after done, and after Abandon
}

// NewVM makes the logs of a VM that is to be started.
func NewVM(name, stateDir string) (*VM, error) {
	logs, err := NewLogs(stateDir)
	if err != nil {
		return nil, err
	}
	return &VM{Name: name, Logs: logs, done: make(chan struct{})}, nil
}

// PID implements hypervisor.VM.
func (v *VM) PID() int { return v.Proc.PID() }

// Done implements hypervisor.VM.
func (v *VM) Done() <-chan struct{} { return v.done }

// Exit implements hypervisor.VM.
func (v *VM) Exit() hypervisor.Exit {
	select {
	case <-v.done:
		return v.exit
	default:
		return hypervisor.Exit{}
	}
}

// EndedError is what methods of a VM answer after Done: errdefs.ErrFailedPrecondition with the reason of the end.
func (v *VM) EndedError() error { return fmt.Errorf("%w: %w", errdefs.ErrFailedPrecondition, v.Exit()) }

// BeginBoot marks the VM as booted; errdefs.ErrFailedPrecondition if it was already, or has ended.
func (v *VM) BeginBoot() error {
	select {
	case <-v.done:
		return v.EndedError()
	default:
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.booted {
		return fmt.Errorf("the VM was booted already: %w", errdefs.ErrFailedPrecondition)
	}
	v.booted = true
	return nil
}

// Booted reports whether BeginBoot was called.
func (v *VM) Booted() bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.booted
}

// Stop implements hypervisor.VM.
func (v *VM) Stop(ctx context.Context) error {
	if v.Booted() {
		select {
		case <-v.done:
			return nil
		case <-ctx.Done():
		}
	}
	v.Kill()
	return nil
}

// Kill implements hypervisor.VM.
func (v *VM) Kill() {
	select {
	case <-v.Proc.Done(): // its end was not ours
	default:
		v.mu.Lock()
		v.killed = true
		v.mu.Unlock()
		_ = v.Proc.Kill()
	}
	<-v.done
}

// Fail ends the VMM because something is broken; the first cause is the one that people read.
func (v *VM) Fail(cause string) {
	v.mu.Lock()
	if v.cause == "" {
		v.cause = cause
	}
	v.mu.Unlock()
	_ = v.Proc.Kill()
}

// AwaitExit leaves the VMM time to end by itself, and ends it for the given cause if it does not.
func (v *VM) AwaitExit(cause string) {
	timer := time.NewTimer(exitGrace)
	defer timer.Stop()
	select {
	case <-v.Proc.Done():
	case <-timer.C:
		v.Fail(cause)
	}
}

// Abandon ends a VMM whose start failed. It gets the given time to end by itself, so that its exit tells the reason; own is
// true if it did. The end is what Classify makes of end.
func (v *VM) Abandon(grace time.Duration, end func() GuestEnd) (_ hypervisor.Exit, own bool) {
	timer := time.NewTimer(grace)
	defer timer.Stop()
	select {
	case <-v.Proc.Done():
		own = true
	case <-timer.C:
		_ = v.Proc.Kill()
		<-v.Proc.Done()
	}
	v.Logs.Drain()
	v.exit = v.classify(end())
	return v.exit, own
}

// Settle is the end of a VM whose process is gone, with all it wrote read and all it held released. Everybody who waits for
// Done goes on.
func (v *VM) Settle(end GuestEnd) {
	v.Logs.Close()
	v.exit = v.classify(end)
	close(v.done)
}

// GuestEnd is what a VMM said about the guest's end before it was gone itself.
type GuestEnd struct {
	// Panicked: the guest reported a panic; Words are the VMM's about it, if it has any. More: they say what the guest's
	// console does not.
	Panicked bool
	Words    string
	More     bool
	// Reset: the guest reset itself. PoweredOff: it powered itself off.
	Reset      bool
	PoweredOff bool
	// Own says, for people, that the VMM ended by itself and why; for a process that exited where nothing else is known.
	Own string
}

// classify tells why the VM ended. The process is gone and everything it wrote was read.
func (v *VM) classify(end GuestEnd) hypervisor.Exit {
	v.mu.Lock()
	killed, cause := v.killed, v.cause
	v.mu.Unlock()
	e := hypervisor.Exit{VMMLog: v.Logs.VMM.Quote(), Console: v.Logs.Console.QuoteAround(PanicMark)}
	text, _ := v.Logs.Console.Text()
	status := v.Proc.Status()
	switch {
	case end.Panicked:
		e.Reason, e.Detail = hypervisor.ExitGuestPanic, PanicLine(text)
		switch {
		case e.Detail == "" && end.Words == "":
			e.Detail = "the guest reported a panic"
		case e.Detail == "":
			e.Detail = end.Words
		case end.More:
			e.Detail += "; " + end.Words
		}
	case end.Reset:
		e.Reason, e.Detail = hypervisor.ExitGuestPanic, PanicLine(text)
		if e.Detail == "" {
			e.Detail = "the guest reset itself, without a kernel panic on its console"
		}
	case end.PoweredOff:
		e.Reason, e.Detail = hypervisor.ExitStopped, "the guest powered off"
	case cause != "":
		e.Reason, e.Detail = hypervisor.ExitVMM, cause
	case killed:
		e.Reason, e.Detail = hypervisor.ExitStopped, "stopped from outside"
	case status.Signaled():
		e.Reason, e.Detail = hypervisor.ExitVMM, Signaled(v.Name, status.Signal())
	case end.Own != "":
		e.Reason, e.Detail = hypervisor.ExitVMM, end.Own
	default:
		e.Reason, e.Detail = hypervisor.ExitVMM, fmt.Sprintf("%s exited with status %d", v.Name, status.ExitStatus())
	}
	return e
}

// QuoteLog is the VMM's own words for an error, on a line of their own; empty if it said nothing.
func (v *VM) QuoteLog() string {
	if s := v.Logs.VMM.Quote(); s != "" {
		return "\n" + v.Name + " said:\n" + s
	}
	return ""
}
