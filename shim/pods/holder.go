// SPDX-License-Identifier: Apache-2.0

package pods

import (
	"fmt"
	"sync"

	"github.com/containerd/errdefs"
)

// Mode is the way by which the pod was asked for.
type Mode int

// Modes.
const (
	// ModeNone: there is no pod.
	ModeNone Mode = iota
	// ModeSandbox: by Sandbox.CreateSandbox.
	ModeSandbox
	// ModePause: by Task.Create for CRI's pause container.
	ModePause
	// ModeSingle: by Task.Create for a container without CRI.
	ModeSingle
)

// Holder keeps the process's pod. Its zero value has none.
type Holder struct {
	mu   sync.Mutex
	mode Mode
	id   string
	pod  Pod
}

// Claim reserves the place for a pod; errdefs.ErrAlreadyExists if it is taken.
func (h *Holder) Claim(mode Mode, id string) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.mode != ModeNone {
		return fmt.Errorf("this shim has the pod %s already: %w", h.id, errdefs.ErrAlreadyExists)
	}
	h.mode, h.id = mode, id
	return nil
}

// Set puts the pod into the place claimed before.
func (h *Holder) Set(pod Pod) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.pod = pod
}

// Release empties the place. The pod has ended, or was never made.
func (h *Holder) Release() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.mode, h.id, h.pod = ModeNone, "", nil
}

// Mode is ModeNone if there is no pod, and none is being made.
func (h *Holder) Mode() Mode {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.mode
}

// Get returns the pod, its id and mode; errdefs.ErrNotFound if there is none yet.
func (h *Holder) Get() (Pod, string, Mode, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.pod == nil {
		return nil, h.id, h.mode, fmt.Errorf("this shim has no sandbox: %w", errdefs.ErrNotFound)
	}
	return h.pod, h.id, h.mode, nil
}
