// SPDX-License-Identifier: Apache-2.0

package qmp

import (
	"fmt"
	"sync"

	"github.com/containerd/errdefs"
)

// eventQueue decouples the reader from the handler. It is bounded; more than its bounds is an error and not a silent
// loss, since one of the lost events could be the one that says why the VM ended.
type eventQueue struct {
	mu     sync.Mutex
	ready  sync.Cond
	queue  []Event
	bytes  int
	closed bool
}

func newEventQueue() *eventQueue {
	q := &eventQueue{}
	q.ready.L = &q.mu
	return q
}

func (q *eventQueue) put(e Event) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	if len(q.queue) >= maxEvents || q.bytes+len(e.Data) > maxEventBytes {
		return fmt.Errorf("QEMU sends events faster than they are handled: %w", errdefs.ErrResourceExhausted)
	}
	q.queue = append(q.queue, e)
	q.bytes += len(e.Data)
	q.ready.Signal()
	return nil
}

// close lets drain return once the queue is empty.
func (q *eventQueue) close() {
	q.mu.Lock()
	q.closed = true
	q.ready.Signal()
	q.mu.Unlock()
}

// drain calls handler for each event until the queue is closed and empty.
func (q *eventQueue) drain(handler func(Event)) {
	for {
		q.mu.Lock()
		for len(q.queue) == 0 && !q.closed {
			q.ready.Wait()
		}
		batch := q.queue
		q.queue, q.bytes = nil, 0
		q.mu.Unlock()
		if len(batch) == 0 {
			return
		}
		for _, e := range batch {
			handler(e)
		}
	}
}
