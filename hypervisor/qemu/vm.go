// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/cloister-project/cloister/hypervisor"
	"github.com/cloister-project/cloister/hypervisor/qemu/qmp"
	"github.com/cloister-project/cloister/hypervisor/vsock"
	"github.com/cloister-project/cloister/hypervisor/vsock/vhostuser"
)

const (
	// exitGrace is for QEMU to be gone after it has closed its QMP connection or the vsock device's.
	exitGrace = 2 * time.Second
	// drainGrace is for reading to its end what a QEMU that is gone has left.
	drainGrace = time.Second
)

// vm implements hypervisor.VM.
type vm struct {
	doc         hypervisor.Document
	proc        *process
	qmp         *qmp.Client
	transport   vsock.Transport
	vsockDevice *vhostuser.Device // nil with the kernel's vsock
	console     *tail
	log         *tail
	copiers     sync.WaitGroup
	sources     []interface{ SetReadDeadline(time.Time) error }

	mu      sync.Mutex
	booted  bool
	killed  bool // we ended the process, because of cause or by the owner's wish
	cause   string
	end     endEvents
	disks   diskTable
	shares  shareTable
	deleted map[string]chan struct{} // device ids whose DEVICE_DELETED is awaited
	ioFault int

	done chan struct{}
	exit hypervisor.Exit // valid after done
}

var _ hypervisor.VM = (*vm)(nil)

func newVM(doc hypervisor.Document, stateDir string) (*vm, error) {
	console, err := newTail(filepath.Join(stateDir, ConsoleLog))
	if err != nil {
		return nil, fmt.Errorf("console log: %w", err)
	}
	log, err := newTail(filepath.Join(stateDir, VMMLog))
	if err != nil {
		return nil, errors.Join(fmt.Errorf("QEMU's log: %w", err), console.remove())
	}
	return &vm{
		doc:     doc,
		console: console,
		log:     log,
		disks:   newDiskTable(doc.Disks),
		shares:  newShareTable(doc.SharedDirectories),
		deleted: make(map[string]chan struct{}),
		done:    make(chan struct{}),
	}, nil
}

// copyLogs reads the console and QEMU's output until they end.
func (v *vm) copyLogs(console net.Conn, output *os.File) {
	v.sources = append(v.sources, console, output)
	copyLog := func(t *tail, r io.ReadCloser) {
		v.copiers.Go(func() {
			defer r.Close()
			t.copyFrom(r)
		})
	}
	copyLog(v.console, console)
	copyLog(v.log, output)
}

// drainLogs waits until everything that QEMU wrote is read. QEMU is gone.
func (v *vm) drainLogs() {
	for _, s := range v.sources {
		// Nobody else should have the other end. If somebody has, there is no end to wait for.
		_ = s.SetReadDeadline(time.Now().Add(drainGrace))
	}
	v.copiers.Wait()
}

// abandon ends a VM whose start failed, before it has a watcher. QEMU gets the given time to end by itself, so that its
// exit tells the reason; own is true if it did.
func (v *vm) abandon(grace time.Duration) (own bool) {
	timer := time.NewTimer(grace)
	defer timer.Stop()
	select {
	case <-v.proc.done:
		own = true
	case <-timer.C:
		_ = v.proc.kill()
		<-v.proc.done
	}
	v.drainLogs()
	v.exit = v.classify()
	return own
}

// discard releases what a failed start leaves.
func (v *vm) discard() error {
	var err error
	if v.transport != nil {
		err = v.transport.Close()
	}
	return errors.Join(err, v.console.remove(), v.log.remove())
}

// quoteLog is QEMU's own words for an error, on a line of their own.
func (v *vm) quoteLog() string {
	if s := v.log.quote(); s != "" {
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
	case <-v.proc.done:
	case <-v.qmp.Done():
		if err := v.qmp.Err(); !errors.Is(err, io.EOF) {
			v.fail(controlBroke(err))
		} else {
			v.awaitExit("QEMU closed its control connection and did not end")
		}
	case <-vsockDown:
		v.awaitExit(fmt.Sprintf("the vsock device failed: %v", v.vsockDevice.Err()))
	}
	<-v.proc.done
	select {
	case <-v.qmp.Done():
		// A QEMU that broke the protocol may have ended before that was seen.
		if err := v.qmp.Err(); !errors.Is(err, io.EOF) && !errors.Is(err, unix.ECONNRESET) && !errors.Is(err, unix.EPIPE) {
			v.fail(controlBroke(err))
		}
	case <-time.After(drainGrace):
		v.qmp.Close()
		<-v.qmp.Done()
	}
	v.drainLogs()
	v.console.close()
	v.log.close()
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
	case <-v.proc.done:
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
	_ = v.proc.kill()
}

// PID implements hypervisor.VM.
func (v *vm) PID() int { return v.proc.pid() }

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
	case <-v.proc.done: // its end was not ours
	default:
		v.mu.Lock()
		v.killed = true
		v.mu.Unlock()
		_ = v.proc.kill()
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
