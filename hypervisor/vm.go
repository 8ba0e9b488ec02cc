// SPDX-License-Identifier: Apache-2.0

package hypervisor

import (
	"context"
	"fmt"
	"os"

	"github.com/cloister-project/cloister/hypervisor/vsock"
)

// Resources are the live things that a Document only names. A driver's Start takes them over: it closes them when they
// are handed to the VMM, and on every error.
type Resources struct {
	// Taps holds each NIC's tap file, by NIC.ID.
	Taps map[string]*os.File
	// VhostNet holds /dev/vhost-net files, by NIC.ID, where NIC.VhostNet is set.
	VhostNet map[string]*os.File
	// Vsock is the transport that holds the document's Vsock.CID; with VsockVhost only. The VM closes it at its end.
	Vsock *vsock.Kernel
	// NetNS, where not nil, is the network namespace that the VMM runs in. The driver does not close it.
	NetNS *os.File
	// StateDir is an existing directory of this VM alone, for sockets and logs; a path short enough for sockets in it
	// (sun_path, 108 bytes).
	StateDir string
	// OnStart is called with the VMM's pid once it exists and before the guest runs, for the host's cgroup. An error
	// ends the start. May be nil.
	OnStart func(pid int) error
}

// Close closes all of it, for a caller that does not come to a driver's Start.
func (r Resources) Close() {
	if r.Vsock != nil {
		_ = r.Vsock.Close()
	}
	for _, files := range []map[string]*os.File{r.Taps, r.VhostNet} {
		for _, f := range files {
			if f != nil {
				_ = f.Close()
			}
		}
	}
}

// VM is a started virtual machine. A driver's Start returns it with its devices ready and its virtual CPUs stopped, so
// that listeners can be bound and disks added before the guest's first instruction; Boot lets it run. All methods may be
// called from any goroutine. After the VM has ended they answer with errdefs.ErrFailedPrecondition wrapped with the reason
// of the end.
type VM interface {
	// PID of the VMM process on the host.
	PID() int
	// Boot starts the virtual CPUs for the first time. It does not wait for the guest.
	Boot(ctx context.Context) error
	// Vsock is the transport to the guest; closed by the VM when it has ended.
	Vsock() vsock.Transport
	// AddDisk hot-plugs a disk; it is there for the guest to find by its serial when AddDisk returns or soon after.
	AddDisk(ctx context.Context, d Disk) error
	// RemoveDisk unplugs a disk by Disk.ID and waits until its file is closed.
	RemoveDisk(ctx context.Context, id string) error
	// AddSharedDirectory hot-plugs a virtio-fs device; errdefs.ErrResourceExhausted when the VM has Document.SharedDirectories
	// already.
	AddSharedDirectory(ctx context.Context, f SharedDirectory) error
	// Grow gives the running VM so much RAM in all, if it has less, and waits until the guest has taken it. The VM keeps what the guest
	// has taken before an error. errdefs.ErrOutOfRange: more than Document.Memory.MaxBytes, or than the guest took.
	Grow(ctx context.Context, memoryBytes uint64) error
	// Stop ends the VM: it waits for the guest to power off by itself until ctx ends, then kills the VMM. It returns
	// when the VMM process is gone and reaped. Idempotent.
	Stop(ctx context.Context) error
	// Kill ends the VMM at once and waits until it is gone. Idempotent.
	Kill()
	// Done is closed when the VMM process is gone.
	Done() <-chan struct{}
	// Exit tells why the VM ended; valid after Done.
	Exit() Exit
}

// ExitReason classifies the end of a VM.
type ExitReason string

// Exit reasons.
const (
	// ExitStopped: the guest powered off, or the VM was stopped or killed by its owner.
	ExitStopped ExitReason = "stopped"
	// ExitGuestPanic: the guest's kernel panicked, or the guest reset itself unasked.
	ExitGuestPanic ExitReason = "guest-panic"
	// ExitVMM: the VMM died or failed on its own (killed by somebody, crashed, could not start).
	ExitVMM ExitReason = "vmm-failed"
)

// Exit is the end of a VM.
type Exit struct {
	Reason ExitReason
	// Detail for people: the VMM's own words, its exit status, the guest's panic message.
	Detail string
	// VMMLog and Console are the tails of the VMM's stderr and of the guest's console. Written by the guest: hostile
	// bytes, already stripped of control characters, bounded.
	VMMLog  string
	Console string
}

// Error describes the exit with what a person needs to act on.
func (e Exit) Error() string {
	s := fmt.Sprintf("VM ended (%s)", e.Reason)
	if e.Detail != "" {
		s += ": " + e.Detail
	}
	if e.VMMLog != "" {
		s += "\nVMM said:\n" + e.VMMLog
	}
	if e.Console != "" {
		s += "\nlast lines of the guest's console:\n" + e.Console
	}
	return s
}
