// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/cloister-project/cloister/hypervisor"
	"github.com/cloister-project/cloister/hypervisor/hotplug"
	"github.com/cloister-project/cloister/hypervisor/qemu/qmp"
	"github.com/cloister-project/cloister/hypervisor/supervise"
	"github.com/cloister-project/cloister/hypervisor/vsock"
	"github.com/cloister-project/cloister/hypervisor/vsock/vhostuser"
)

// exitGrace is for QEMU to be gone after it has closed its QMP connection or the vsock device's.
const exitGrace = 2 * time.Second

// vm implements hypervisor.VM.
type vm struct {
	doc         hypervisor.Document
	proc        *supervise.Process
	qmp         *qmp.Client
	transport   vsock.Transport
	vsockDevice *vhostuser.Device // nil with the kernel's vsock
	logs        *supervise.Logs
	disks       *hotplug.Disks
	shares      *hotplug.Directories

	mu      sync.Mutex
	booted  bool
	killed  bool // we ended the process, because of cause or by the owner's wish
	cause   string
	end     endEvents
	deleted map[string]chan struct{} // device ids whose DEVICE_DELETED is awaited
	ioFault int

	done chan struct{}
	exit hypervisor.Exit // valid after done
}

var _ hypervisor.VM = (*vm)(nil)

func newVM(doc hypervisor.Document, stateDir string) (*vm, error) {
	logs, err := supervise.NewLogs(stateDir)
	if err != nil {
		return nil, err
	}
	return &vm{
		doc:     doc,
		logs:    logs,
		disks:   hotplug.NewDisks(doc.Disks, maxDisks),
		shares:  hotplug.NewDirectories(doc.SharedDirectories),
		deleted: make(map[string]chan struct{}),
		done:    make(chan struct{}),
	}, nil
}

// abandon ends a VM whose start failed, before it has a watcher. QEMU gets the given time to end by itself, so that its
// exit tells the reason; own is true if it did.
func (v *vm) abandon(grace time.Duration) (own bool) {
	timer := time.NewTimer(grace)
	defer timer.Stop()
	select {
	case <-v.proc.Done():
		own = true
	case <-timer.C:
		_ = v.proc.Kill()
		<-v.proc.Done()
	}
	v.logs.Drain()
	v.exit = v.classify()
	return own
}

// discard releases what a failed start leaves.
func (v *vm) discard() error {
	var err error
	if v.transport != nil {
		err = v.transport.Close()
	}
	return errors.Join(err, v.logs.Remove())
}

// quoteLog is QEMU's own words for an error, on a line of their own.
func (v *vm) quoteLog() string {
	if s := v.logs.VMM.Quote(); s != "" {
		return "\nQEMU said:\n" + s
	}
	return ""
}

// watch settles the VM's end. It is the last of the VM's goroutines.
func (v *vm) watch() {
	var vsockDown <-chan struct{}
	if v.vsockDevice != nil {
		vsockDown = v.vsockDevice.Done()
	}
	select {
	case <-v.proc.Done():
	case <-v.qmp.Done():
		if err := v.qmp.Err(); !errors.Is(err, io.EOF) {
			v.fail(controlBroke(err))
		} else {
			v.awaitExit("QEMU closed its control connection and did not end")
		}
	case <-vsockDown:
		v.awaitExit(fmt.Sprintf("the vsock device failed: %v", v.vsockDevice.Err()))
	}
	<-v.proc.Done()
	select {
	case <-v.qmp.Done():
		// A QEMU that broke the protocol may have ended before that was seen.
		if err := v.qmp.Err(); !errors.Is(err, io.EOF) && !errors.Is(err, unix.ECONNRESET) && !errors.Is(err, unix.EPIPE) {
			v.fail(controlBroke(err))
		}
	case <-time.After(supervise.DrainGrace):
		v.qmp.Close()
		<-v.qmp.Done()
	}
	v.logs.Drain()
	v.logs.Close()
	_ = v.transport.Close() // nothing can be done about an error, and the VM's end matters more
	v.exit = v.classify()
	close(v.done)
}

func controlBroke(err error) string { return fmt.Sprintf("the control connection broke: %v", err) }

// awaitExit leaves QEMU time to end by itself, and ends it for the given cause if it does not.
func (v *vm) awaitExit(cause string) {
	timer := time.NewTimer(exitGrace)
	defer timer.Stop()
	select {
	case <-v.proc.Done():
	case <-timer.C:
		v.fail(cause)
	}
}

// fail ends QEMU because something is broken; cause is for people.
func (v *vm) fail(cause string) {
	v.mu.Lock()
	if v.cause == "" {
		v.cause = cause
	}
	v.mu.Unlock()
	_ = v.proc.Kill()
}

// PID implements hypervisor.VM.
func (v *vm) PID() int { return v.proc.PID() }

// Vsock implements hypervisor.VM.
func (v *vm) Vsock() vsock.Transport { return v.transport }

// Done implements hypervisor.VM.
func (v *vm) Done() <-chan struct{} { return v.done }

// Exit implements hypervisor.VM.
func (v *vm) Exit() hypervisor.Exit {
	select {
	case <-v.done:
		return v.exit
	default:
		return hypervisor.Exit{}
	}
}

// Boot implements hypervisor.VM.
func (v *vm) Boot(ctx context.Context) error {
	v.mu.Lock()
	again := v.booted
	v.booted = true
	v.mu.Unlock()
	if again {
		return fmt.Errorf("the VM was booted already: %w", errdefs.ErrFailedPrecondition)
	}
	return v.execute(ctx, "cont", nil, nil)
}

// Stop implements hypervisor.VM.
func (v *vm) Stop(ctx context.Context) error {
	v.mu.Lock()
	booted := v.booted
	v.mu.Unlock()
	if booted {
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
func (v *vm) Kill() {
	select {
	case <-v.proc.Done(): // its end was not ours
	default:
		v.mu.Lock()
		v.killed = true
		v.mu.Unlock()
		_ = v.proc.Kill()
	}
	<-v.done
}

// execute runs a QMP command. A VM that has ended, or ends meanwhile, gives the reason of its end.
func (v *vm) execute(ctx context.Context, command string, arguments, result any) error {
	err := v.qmp.Execute(ctx, command, arguments, result)
	if err == nil || v.qmp.Err() == nil {
		return err
	}
	select {
	case <-v.done:
		return fmt.Errorf("%w: %w", errdefs.ErrFailedPrecondition, v.exit)
	case <-ctx.Done():
		return err
	}
}
