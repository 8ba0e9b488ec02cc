// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	"github.com/containerd/log"

	"github.com/cloister-project/cloister/hypervisor/qemu/qmp"
	"github.com/cloister-project/cloister/hypervisor/supervise"
)

// endEvents is what QMP's events said about the VM's end.
type endEvents struct {
	// shutdown is SHUTDOWN's reason (ShutdownCause in QEMU's qapi/run-state.json).
	shutdown string
	// panicked is what GUEST_PANICKED said, for people.
	panicked string
	// byTEE: it says why a confidential guest ended itself, which its console may not tell.
	byTEE bool
}

const (
	// maxIOFaults bounds the log lines about broken disks: a guest can cause as many as it likes.
	maxIOFaults   = 10
	statusTimeout = 5 * time.Second
)

// onEvent is QMP's handler; it runs in the client's dispatcher, so it may execute commands.
func (v *vm) onEvent(e qmp.Event) {
	switch e.Name {
	case "SHUTDOWN":
		var d struct{ Reason string }
		_ = json.Unmarshal(e.Data, &d) // an empty reason is one that is not known
		v.mu.Lock()
		// The first is the cause; QEMU may send more on its way out.
		if v.end.shutdown == "" {
			v.end.shutdown = d.Reason
		}
		v.mu.Unlock()
	case "GUEST_PANICKED", "GUEST_CRASHLOADED":
		v.mu.Lock()
		v.end.panicked, v.end.byTEE = describePanic(e.Data)
		v.mu.Unlock()
	case "DEVICE_DELETED":
		var d struct{ Device string }
		_ = json.Unmarshal(e.Data, &d)
		v.mu.Lock()
		if ch := v.deleted[d.Device]; ch != nil {
			close(ch)
			delete(v.deleted, d.Device)
		}
		v.mu.Unlock()
	case "MEMORY_DEVICE_SIZE_CHANGE":
		v.onSizeChange(e.Data)
	case "STOP":
		v.onStop()
	case "BLOCK_IO_ERROR":
		v.onIOError(e.Data)
	}
}

// onStop looks why the virtual CPUs stand still. Nobody here asks for that: it is KVM that gave up, and the guest would
// hang for ever.
func (v *vm) onStop() {
	v.mu.Lock()
	client, ending := v.qmp, v.end != endEvents{}
	v.mu.Unlock()
	if ending || client == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), statusTimeout)
	defer cancel()
	var s struct{ Status string }
	if err := client.Execute(ctx, "query-status", nil, &s); err != nil {
		return // it is on its way out
	}
	if s.Status == "internal-error" || s.Status == "io-error" {
		v.Fail("QEMU cannot execute the guest any more: " + s.Status)
	}
}

func (v *vm) onIOError(data json.RawMessage) {
	var d struct {
		Node      string `json:"node-name"`
		Operation string
		Reason    string
	}
	_ = json.Unmarshal(data, &d)
	v.mu.Lock()
	v.ioFault++
	n := v.ioFault
	v.mu.Unlock()
	if n <= maxIOFaults {
		log.L.WithField("sandbox", v.doc.ID).WithField("disk", d.Node).WithField("operation", d.Operation).
			Warnf("the host cannot serve a guest's disk: %s", d.Reason)
	}
}

// describePanic turns GUEST_PANICKED's data (GuestPanicInformation of QEMU's qapi/run-state.json) into a line: TDX and SEV
// guests tell why they ended themselves. tee is true for these.
func describePanic(data json.RawMessage) (line string, tee bool) {
	var d struct {
		Info struct {
			Type string
			// tdx: the guest's ReportFatalError, Intel TDX Guest-Hypervisor Communication Interface.
			ErrorCode *uint64 `json:"error-code"`
			Message   string
			GPA       *uint64
			// sev: the guest's termination request, SEV-ES Guest-Hypervisor Communication Block Standardization (AMD 56421).
			Set  *uint64
			Code *uint64
			// s390
			Reason string
		}
	}
	_ = json.Unmarshal(data, &d)
	i := d.Info
	s := "the guest reported a panic"
	if i.Type == "" {
		return s, false
	}
	s += " (" + supervise.Clip(i.Type)
	for _, n := range []struct {
		name  string
		value *uint64
	}{{"error code", i.ErrorCode}, {"set", i.Set}, {"code", i.Code}, {"more at guest address", i.GPA}} {
		if n.value != nil {
			s += fmt.Sprintf(", %s %#x", n.name, *n.value)
		}
	}
	for _, words := range []string{i.Message, i.Reason} {
		if words = supervise.Clip(words); words != "" {
			s += ", " + words
		}
	}
	return s + ")", i.Type == "tdx" || i.Type == "sev"
}

// guestEnd is what QEMU said of the VM's end.
func (v *vm) guestEnd() supervise.GuestEnd {
	v.mu.Lock()
	end := v.end
	v.mu.Unlock()
	g := supervise.GuestEnd{
		Panicked: end.panicked != "" || end.shutdown == "guest-panic", Words: end.panicked, More: end.byTEE,
		Reset: end.shutdown == "guest-reset", PoweredOff: end.shutdown == "guest-shutdown",
	}
	switch end.shutdown {
	case "":
	case "host-signal":
		g.Own = "QEMU was ended by a signal of somebody on the host"
	default:
		g.Own = fmt.Sprintf("QEMU ended itself (%s), exit status %d", supervise.Clip(end.shutdown), v.Proc.Status().ExitStatus())
	}
	return g
}
