// SPDX-License-Identifier: Apache-2.0

package events

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	eventstypes "github.com/containerd/containerd/api/events"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/containerd/typeurl/v2"
	"google.golang.org/protobuf/types/known/timestamppb"
)

const (
	// maxQueued bounds what is kept for a containerd that does not answer: about 1 MiB.
	maxQueued = 4096
	// maxRefused is how often an event that containerd answered with an error is tried.
	maxRefused = 5

	firstRetry = 50 * time.Millisecond
	lastRetry  = 5 * time.Second
)

// Send gives one event to containerd. An error that is errdefs.ErrUnavailable means that it may work later.
type Send func(ctx context.Context, e *Envelope) error

// Envelope is an event on its way.
type Envelope = types.Envelope

// Queue sends events one after the other.
type Queue struct {
	namespace string
	send      Send

	wake   chan struct{}
	cancel context.CancelFunc
	done   chan struct{}

	mu      sync.Mutex
	pending []*types.Envelope
	dropped int
	closing bool
}

// NewQueue starts a queue. ctx only carries the logger; Close ends the queue.
func NewQueue(ctx context.Context, namespace string, send Send) *Queue {
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	q := &Queue{namespace: namespace, send: send, wake: make(chan struct{}, 1), cancel: cancel, done: make(chan struct{})}
	go q.run(ctx)
	return q
}

// Topic is containerd's name for an event's kind; empty for what is no task event.
func Topic(event any) string {
	switch event.(type) {
	case *eventstypes.TaskCreate:
		return "/tasks/create"
	case *eventstypes.TaskStart:
		return "/tasks/start"
	case *eventstypes.TaskOOM:
		return "/tasks/oom"
	case *eventstypes.TaskExit:
		return "/tasks/exit"
	case *eventstypes.TaskDelete:
		return "/tasks/delete"
	case *eventstypes.TaskExecAdded:
		return "/tasks/exec-added"
	case *eventstypes.TaskExecStarted:
		return "/tasks/exec-started"
	case *eventstypes.TaskPaused:
		return "/tasks/paused"
	case *eventstypes.TaskResumed:
		return "/tasks/resumed"
	}
	return ""
}

// Publish queues an event. It never blocks. Events after Close are dropped.
func (q *Queue) Publish(event any) {
	topic := Topic(event)
	body, err := typeurl.MarshalAnyToProto(event)
	if topic == "" || err != nil {
		log.L.WithError(err).Errorf("event of type %T cannot be published", event)
		return
	}
	e := &types.Envelope{Timestamp: timestamppb.Now(), Namespace: q.namespace, Topic: topic, Event: body}
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.closing {
		return
	}
	if len(q.pending) >= maxQueued {
		q.pending = q.pending[1:]
		q.dropped++
	}
	q.pending = append(q.pending, e)
	q.poke()
}

func (q *Queue) poke() {
	select {
	case q.wake <- struct{}{}:
	default:
	}
}

// Close sends what is queued, for as long as ctx allows, and ends the queue.
func (q *Queue) Close(ctx context.Context) error {
	q.mu.Lock()
	q.closing = true
	q.poke()
	q.mu.Unlock()
	defer q.cancel()
	select {
	case <-q.done:
	case <-ctx.Done():
		q.cancel()
		<-q.done
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	if n := len(q.pending); n > 0 {
		return fmt.Errorf("%d events were not delivered: %w", n, ctx.Err())
	}
	return nil
}

// next waits for an event; false at the end.
func (q *Queue) next(ctx context.Context) (*types.Envelope, bool) {
	for {
		q.mu.Lock()
		dropped, closing := q.dropped, q.closing
		q.dropped = 0
		var e *types.Envelope
		if len(q.pending) > 0 {
			e = q.pending[0]
		}
		q.mu.Unlock()
		if dropped > 0 {
			log.G(ctx).WithField("events", dropped).Error("events were dropped: containerd has not taken any for too long")
		}
		if e != nil {
			return e, true
		}
		if closing {
			return nil, false
		}
		select {
		case <-q.wake:
		case <-ctx.Done():
			return nil, false
		}
	}
}

// finished takes e off the queue, if it was not dropped meanwhile.
func (q *Queue) finished(e *types.Envelope) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if len(q.pending) > 0 && q.pending[0] == e {
		q.pending = q.pending[1:]
	}
}

func (q *Queue) run(ctx context.Context) {
	defer close(q.done)
	for {
		e, ok := q.next(ctx)
		if !ok {
			return
		}
		if !q.deliver(ctx, e) {
			return
		}
		q.finished(e)
	}
}

// deliver sends e until it is taken or refused for good; false when ctx has ended.
func (q *Queue) deliver(ctx context.Context, e *types.Envelope) bool {
	refused := 0
	for wait := firstRetry; ; wait = min(2*wait, lastRetry) {
		err := q.send(ctx, e)
		if err == nil {
			return true
		}
		if ctx.Err() != nil {
			return false
		}
		if wait == firstRetry {
			log.G(ctx).WithError(err).WithField("topic", e.GetTopic()).Warn("containerd did not take an event; it is tried again")
		}
		if !errors.Is(err, errdefs.ErrUnavailable) {
			if refused++; refused >= maxRefused {
				log.G(ctx).WithError(err).WithField("topic", e.GetTopic()).Error("event dropped: containerd refuses it")
				return true
			}
		}
		timer := time.NewTimer(wait)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return false
		}
	}
}
