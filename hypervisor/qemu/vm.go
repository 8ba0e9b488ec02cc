// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cloister-project/cloister/hypervisor"
	"github.com/cloister-project/cloister/hypervisor/hotplug"
	"github.com/cloister-project/cloister/hypervisor/qemu/qmp"
	"github.com/cloister-project/cloister/hypervisor/supervise"
	"github.com/cloister-project/cloister/hypervisor/vsock"
	"github.com/cloister-project/cloister/hypervisor/vsock/vhostuser"
)

// vm implements hypervisor.VM.
type vm struct {
	*supervise.VM
	doc         hypervisor.Document
	qmp         *qmp.Client
	transport   vsock.Transport
	vsockDevice *vhostuser.Device // nil with the kernel's vsock
	disks       *hotplug.Disks
	shares      *hotplug.Directories

	mu      sync.Mutex
	end     endEvents
	deleted map[string]chan struct{} // device ids whose DEVICE_DELETED is awaited
	ioFault int
	// memoryChanged is closed, and removed, at the next change of the memory device's size; nil where nobody waits.
	memoryChanged chan struct{}

	growing chan struct{} // holds one element during Grow
}

var _ hypervisor.VM = (*vm)(nil)

func newVM(doc hypervisor.Document, stateDir string) (*vm, error) {
	base, err := supervise.NewVM("QEMU", stateDir)
	if err != nil {
		return nil, err
	}
	return &vm{
		VM:      base,
		doc:     doc,
		disks:   hotplug.NewDisks(doc.Disks, maxDisks),
		shares:  hotplug.NewDirectories(doc.SharedDirectories),
		deleted: make(map[string]chan struct{}),
		growing: make(chan struct{}, 1),
	}, nil
}

// discard releases what a failed start leaves.
func (v *vm) discard() error {
	var err error
	if v.transport != nil {
		err = v.transport.Close()
	}
	return errors.Join(err, v.Logs.Remove())
}

// watch settles the VM's end. It is the last of the VM's goroutines.
func (v *vm) watch() {
	var vsockDown <-chan struct{}
	if v.vsockDevice != nil {
		vsockDown = v.vsockDevice.Done()
	}
	select {
	case <-v.Proc.Done():
	case <-v.qmp.Done():
		if err := v.qmp.Err(); !errors.Is(err, io.EOF) {
			v.Fail(controlBroke(err))
		} else {
			v.AwaitExit("QEMU closed its control connection and did not end")
		}
	case <-vsockDown:
		v.AwaitExit(fmt.Sprintf("the vsock device failed: %v", v.vsockDevice.Err()))
	}
	<-v.Proc.Done()
	select {
	case <-v.qmp.Done():
		// A QEMU that broke the protocol may have ended before that was seen.
		if err := v.qmp.Err(); !errors.Is(err, io.EOF) && !errors.Is(err, unix.ECONNRESET) && !errors.Is(err, unix.EPIPE) {
			v.Fail(controlBroke(err))
		}
	case <-time.After(supervise.DrainGrace):
		v.qmp.Close()
		<-v.qmp.Done()
	}
	v.Logs.Drain()
	_ = v.transport.Close() // nothing can be done about an error, and the VM's end matters more
	v.Settle(v.guestEnd())
}

func controlBroke(err error) string { return fmt.Sprintf("the control connection broke: %v", err) }

// Vsock implements hypervisor.VM.
func (v *vm) Vsock() vsock.Transport { return v.transport }

// Boot implements hypervisor.VM.
func (v *vm) Boot(ctx context.Context) error {
	if err := v.BeginBoot(); err != nil {
		return err
	}
	return v.execute(ctx, "cont", nil, nil)
}

// execute runs a QMP command. A VM that has ended, or ends meanwhile, gives the reason of its end.
func (v *vm) execute(ctx context.Context, command string, arguments, result any) error {
	err := v.qmp.Execute(ctx, command, arguments, result)
	if err == nil || v.qmp.Err() == nil {
		return err
	}
	select {
	case <-v.Done():
		return v.EndedError()
	case <-ctx.Done():
		return err
	}
}
