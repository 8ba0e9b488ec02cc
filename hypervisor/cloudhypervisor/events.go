// SPDX-License-Identifier: Apache-2.0

package cloudhypervisor

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/containerd/errdefs"
)

// maxEvent bounds one report of the event monitor, in bytes; its longest has some hundred.
const maxEvent = 16 << 10

// event is a report of the event monitor: JSON objects, one behind the other without anything in between.
type event struct {
	Source string `json:"source"`
	Event  string `json:"event"`
}

// readEvents calls f with each report until the stream ends. The VMM may be the guest's by now: a report that is too long or no
// JSON object is errdefs.ErrInvalidArgument, and nothing is read behind it.
func readEvents(r io.Reader, f func(event)) error {
	in := &budget{r: r}
	d := json.NewDecoder(in)
	for {
		in.left = maxEvent
		var e event
		switch err := d.Decode(&e); {
		case errors.Is(err, io.EOF), errors.Is(err, os.ErrDeadlineExceeded):
			return nil
		case errors.Is(err, errTooLong), errors.Is(err, io.ErrUnexpectedEOF):
			return fmt.Errorf("report of the event monitor: %w", err)
		case err != nil:
			return fmt.Errorf("report of the event monitor: %w: %w", err, errdefs.ErrInvalidArgument)
		}
		f(e)
	}
}

var errTooLong = fmt.Errorf("it has more than %d bytes: %w", maxEvent, errdefs.ErrInvalidArgument)

// budget is a reader of so many bytes, which its user sets anew.
type budget struct {
	r    io.Reader
	left int
}

func (b *budget) Read(p []byte) (int, error) {
	if b.left <= 0 {
		return 0, errTooLong
	}
	n, err := b.r.Read(p[:min(len(p), b.left)])
	b.left -= n
	return n, err
}

// endEvents is what the event monitor reported about the VM's end.
type endEvents struct {
	// reset: the guest reset itself, and the VMM was about to start it again.
	reset bool
	// panicked: the guest reported a panic.
	panicked bool
	// shutdown: the VMM took the VM down in good order.
	shutdown bool
}

// onEvent is called for each report, by the goroutine that reads them.
func (v *vm) onEvent(e event) {
	v.mu.Lock()
	switch e {
	case event{"vm", "rebooting"}:
		v.end.reset = true
	case event{"guest", "panic"}:
		v.end.panicked = true
	case event{"vmm", "shutdown"}:
		v.end.shutdown = true
	}
	reset := v.end.reset
	v.mu.Unlock()
	if reset {
		// There is no option that makes a reset the VM's end. A guest that begins anew has no token and reaches nobody.
		_ = v.Proc.Kill()
	}
}
