// SPDX-License-Identifier: Apache-2.0

package cloudhypervisor

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/cloister-project/cloister/hypervisor"
	"github.com/cloister-project/cloister/hypervisor/cloudhypervisor/api"
	"github.com/cloister-project/cloister/hypervisor/hotplug"
	"github.com/cloister-project/cloister/hypervisor/supervise"
	"github.com/cloister-project/cloister/hypervisor/vsock"
	"github.com/cloister-project/cloister/hypervisor/vsock/hybrid"
)

// answerGrace is for a VMM to be gone after it has not answered a request.
const answerGrace = 2 * time.Second

// vm implements hypervisor.VM.
type vm struct {
	*supervise.VM
	doc       hypervisor.Document
	dir       string
	client    *api.Client
	boot      hypervisor.Request
	transport *hybrid.Transport // nil if its path is too long
	mounts    *mountNS          // nil without landlock
	disks     *hotplug.Disks
	shares    *hotplug.Directories

	events     *os.File      // nil before the VMM was started
	eventsDone chan struct{} // closed when no report comes any more; eventsErr is valid then
	eventsErr  error

	mu     sync.Mutex
	end    endEvents
	images map[string]*image // by Disk.ID
}

var _ hypervisor.VM = (*vm)(nil)

func newVM(doc hypervisor.Document, stateDir string) (*vm, error) {
	base, err := supervise.NewVM(name, stateDir)
	if err != nil {
		return nil, err
	}
	v := &vm{
		VM:         base,
		doc:        doc,
		dir:        stateDir,
		client:     &api.Client{Socket: filepath.Join(stateDir, apiName)},
		disks:      hotplug.NewDisks(doc.Disks, maxDisks),
		shares:     hotplug.NewDirectories(doc.SharedDirectories),
		eventsDone: make(chan struct{}),
		images:     make(map[string]*image),
	}
	if doc.Sandboxed {
		v.mounts = &mountNS{dir: filepath.Join(stateDir, disksName)}
	}
	return v, nil
}

// start starts the VMM and has it create the VM. On an error the process is gone; the caller calls discard.
func (v *vm) start(ctx context.Context, inv hypervisor.Invocation, res hypervisor.Resources) (err error) {
	for _, d := range v.doc.Disks {
		if v.images[d.ID], err = openImage(d.Path); err != nil {
			return err
		}
	}
	if v.transport, err = hybrid.New(filepath.Join(v.dir, vsockName), v.doc.Vsock.CID); err != nil {
		return err
	}
	if err := v.launch(inv, res.NetNS); err != nil {
		return err
	}
	if res.OnStart != nil {
		if err := res.OnStart(v.PID()); err != nil {
			v.Abandon(0, v.guestEnd)
			return fmt.Errorf("set up the host's side of %s: %w", name, err)
		}
	}
	if snpOf(v.doc) != nil {
		if err := v.checkFeatures(ctx); err != nil {
			return v.startFailed(ctx, err)
		}
	}
	last := len(inv.Requests) - 1
	v.boot = inv.Requests[last]
	for i, r := range inv.Requests[:last] {
		var files []*os.File
		if i > 0 {
			files = append(files, res.Taps[v.doc.NICs[i-1].ID])
		}
		if _, err := v.client.Do(ctx, r, files...); err != nil {
			return v.startFailed(ctx, err)
		}
	}
	go v.watch()
	return nil
}

// launch starts the process and the reading of what it says.
func (v *vm) launch(inv hypervisor.Invocation, netns *os.File) (err error) {
	// The VMM's ends are closed here once it has its copies, ours if it does not start.
	var ours, theirs []*os.File
	defer func() {
		supervise.CloseFiles(theirs)
		if err != nil {
			supervise.CloseFiles(ours)
		}
	}()
	for range 3 {
		r, w, err := os.Pipe()
		if err != nil {
			return fmt.Errorf("pipe for %s: %w", name, err)
		}
		ours, theirs = append(ours, r), append(theirs, w)
	}
	socket, err := listenAPI(v.client.Socket)
	if err != nil {
		return err
	}
	c := supervise.Command{
		Name: name, Path: inv.Binary, Args: inv.Args, Files: []*os.File{socket, theirs[0]}, Stdout: theirs[1], Stderr: theirs[2], NetNS: netns,
	}
	theirs = append(theirs, socket)
	if v.mounts != nil {
		if err := os.Mkdir(v.mounts.dir, 0o700); err != nil {
			return fmt.Errorf("directory for disks: %w", err)
		}
		c.Prepare = v.mounts.enter
	}
	if v.Proc, err = supervise.Start(c); err != nil {
		return err
	}
	v.events = ours[0]
	v.Logs.Copy(ours[1], ours[2])
	go func() {
		defer close(v.eventsDone)
		v.eventsErr = readEvents(v.events, v.onEvent)
	}()
	return nil
}

// listenAPI returns the listening socket that the VMM inherits: requests can be sent before it serves them.
func listenAPI(path string) (*os.File, error) {
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("socket for %s's API: %w", name, err)
	}
	defer l.Close() // File is a copy
	l.SetUnlinkOnClose(false)
	return l.File()
}

// startFailed ends a VMM that did not create the VM, and returns what there is to say about it.
func (v *vm) startFailed(ctx context.Context, err error) error {
	grace := supervise.DrainGrace
	if answered(err) || ctx.Err() != nil {
		grace = 0
	}
	if exit, own := v.Abandon(grace, v.guestEnd); own && grace > 0 {
		err = exit // it says more than a connection that broke
	} else {
		err = fmt.Errorf("%w%s", err, v.QuoteLog())
	}
	return fmt.Errorf("start %s: %w", name, err)
}

// answered reports whether a request's error is the VMM's own answer: it did not do what it was asked.
func answered(err error) bool {
	var refusal *api.StatusError
	return errors.As(err, &refusal)
}

// release gives up all that the VM holds but its logs. The process is gone, or was never there.
func (v *vm) release() error {
	if v.events != nil {
		_ = v.events.SetReadDeadline(time.Now().Add(supervise.DrainGrace))
		<-v.eventsDone
		_ = v.events.Close()
	}
	var errs []error
	if v.transport != nil {
		errs = append(errs, v.transport.Close())
	}
	if v.mounts != nil {
		v.mounts.close()
		errs = append(errs, removeIfThere(v.mounts.dir))
	}
	v.mu.Lock()
	images := v.images
	v.images = nil
	v.mu.Unlock()
	for _, i := range images {
		if i != nil {
			i.close()
		}
	}
	return errors.Join(append(errs, removeIfThere(v.client.Socket), removeIfThere(filepath.Join(v.dir, vsockName)))...)
}

func removeIfThere(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

// discard releases what a failed start leaves.
func (v *vm) discard() error { return errors.Join(v.release(), v.Logs.Remove()) }

// watch settles the VM's end. It is the last of the VM's goroutines.
func (v *vm) watch() {
	select {
	case <-v.Proc.Done():
	case <-v.eventsDone:
		if v.eventsErr != nil {
			v.Fail(v.eventsErr.Error())
		} else {
			v.AwaitExit(name + " closed its event monitor and did not end")
		}
	}
	<-v.Proc.Done()
	v.Logs.Drain()
	_ = v.release() // nothing can be done about an error, and the VM's end matters more
	v.Settle(v.guestEnd())
}

// guestEnd is what the event monitor said of the VM's end. A VMM that gives up by itself takes the VM down in the same way as
// for a guest that powers off; its log, which the Exit quotes, tells.
func (v *vm) guestEnd() supervise.GuestEnd {
	v.mu.Lock()
	defer v.mu.Unlock()
	status := v.Proc.Status()
	return supervise.GuestEnd{
		Panicked: v.end.panicked, Reset: v.end.reset,
		PoweredOff: v.end.shutdown && status.Exited() && status.ExitStatus() == 0,
	}
}

// Vsock implements hypervisor.VM.
func (v *vm) Vsock() vsock.Transport { return v.transport }

// Boot implements hypervisor.VM. Cloud Hypervisor opens disks and asks KVM here, so that what is wrong with them shows only now.
func (v *vm) Boot(ctx context.Context) error {
	if err := v.BeginBoot(); err != nil {
		return err
	}
	if err := v.send(ctx, v.boot); err != nil {
		return fmt.Errorf("boot the VM: %w%s", err, v.QuoteLog())
	}
	return nil
}

// send sends a request. A VM that has ended, or ends meanwhile, gives the reason of its end.
func (v *vm) send(ctx context.Context, r hypervisor.Request) error {
	_, err := v.client.Do(ctx, r)
	if err == nil || answered(err) {
		return err
	}
	timer := time.NewTimer(answerGrace)
	defer timer.Stop()
	select {
	case <-v.Done():
		return v.EndedError()
	case <-ctx.Done():
	case <-timer.C:
	}
	return err
}
