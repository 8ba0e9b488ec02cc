// SPDX-License-Identifier: Apache-2.0

package container

import (
	"context"
	"sync"

	agentv1 "github.com/cloister-project/cloister/agent-protocol/v1"
)

// maxEvents is how many events are kept for a host that does not ask. The oldest go first: an OOM event carries a
// total, so that a later one makes up for a lost one.
const maxEvents = 1024

// eventLog numbers events and hands them to whoever waits.
type eventLog struct {
	mu      sync.Mutex
	last    uint64
	events  []*agentv1.Event
	changed chan struct{} // closed and replaced with each event
}

func newEventLog() *eventLog { return &eventLog{changed: make(chan struct{})} }

func (l *eventLog) add(e *agentv1.Event) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.last++
	e.Sequence = l.last
	l.events = append(l.events, e)
	if len(l.events) > maxEvents {
		l.events = append([]*agentv1.Event(nil), l.events[len(l.events)-maxEvents:]...)
	}
	close(l.changed)
	l.changed = make(chan struct{})
}

// next waits for events above after.
func (l *eventLog) next(ctx context.Context, after uint64) ([]*agentv1.Event, error) {
	for {
		l.mu.Lock()
		changed := l.changed
		var out []*agentv1.Event
		for _, e := range l.events {
			if e.GetSequence() > after {
				out = append(out, e)
			}
		}
		l.mu.Unlock()
		if len(out) > 0 {
			return out, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}
