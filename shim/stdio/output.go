// SPDX-License-Identifier: Apache-2.0

package stdio

import (
	"context"
	"os"
	"sync"

	"github.com/containerd/log"

	"github.com/cloister-project/cloister/hypervisor/vsock"
)

const (
	// smallBuffer is what an idle stream costs; bigBuffer is taken from the pool while bytes come in bursts.
	smallBuffer = 4 << 10
	bigBuffer   = 64 << 10
)

// buffers are shared by all relays of the process.
var buffers = sync.Pool{New: func() any { b := make([]byte, bigBuffer); return &b }}

// sink is a file that one or two outputs write to. It is closed with the last of them.
type sink struct {
	f *os.File

	mu    sync.Mutex
	users int
}

func newSink(f *os.File) *sink { return &sink{f: f, users: 1} }

func (s *sink) share() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.users++
}

func (s *sink) release() {
	s.mu.Lock()
	s.users--
	last := s.users == 0
	s.mu.Unlock()
	if last {
		_ = s.f.Close()
	}
}

// output copies one stream of the guest to a sink and counts what was delivered.
type output struct {
	sink *sink

	mu        sync.Mutex
	conn      vsock.Conn
	delivered uint64
	ended     bool
	waiters   []waiter
}

// waiter is told when enough was delivered.
type waiter struct {
	bytes uint64
	ready chan struct{}
}

func newOutput(s *sink) *output { return &output{sink: s} }

func (o *output) attach(conn vsock.Conn) {
	if conn == nil {
		o.end()
		return
	}
	o.mu.Lock()
	if o.ended {
		o.mu.Unlock()
		_ = conn.Close()
		return
	}
	o.conn = conn
	o.mu.Unlock()
	go o.copy(conn)
}

// copy runs until the guest's stream ends or close. A sink that fails does not stop the process in the guest: its
// output is thrown away from then on, as if it had been delivered.
func (o *output) copy(conn vsock.Conn) {
	defer o.end()
	small := make([]byte, smallBuffer)
	var big *[]byte
	defer func() {
		if big != nil {
			buffers.Put(big)
		}
	}()
	failed := false
	for {
		buf := small
		if big != nil {
			buf = *big
		}
		n, err := conn.Read(buf)
		if n > 0 {
			if !failed {
				if _, werr := o.sink.f.Write(buf[:n]); werr != nil {
					failed = true
					if !o.isEnded() {
						log.L.WithError(werr).WithField("path", o.sink.f.Name()).Warn("a container's output cannot be written and is dropped")
					}
				}
			}
			o.progress(n)
		}
		if err != nil {
			return
		}
		switch {
		case big == nil && n == smallBuffer:
			big = buffers.Get().(*[]byte)
		case big != nil && n < smallBuffer:
			buffers.Put(big)
			big = nil
		}
	}
}

func (o *output) isEnded() bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.ended
}

func (o *output) progress(n int) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.delivered += uint64(n)
	o.tell()
}

// tell wakes the waiters that have what they wait for. The caller holds mu.
func (o *output) tell() {
	kept := o.waiters[:0]
	for _, w := range o.waiters {
		if o.ended || o.delivered >= w.bytes {
			close(w.ready)
		} else {
			kept = append(kept, w)
		}
	}
	o.waiters = kept
}

// end is called when nothing more will be delivered. Repeating it does nothing.
func (o *output) end() {
	o.mu.Lock()
	if o.ended {
		o.mu.Unlock()
		return
	}
	o.ended = true
	conn := o.conn
	o.tell()
	o.mu.Unlock()
	closeConn(conn)
	o.sink.release()
}

func (o *output) drain(ctx context.Context, bytes uint64) {
	o.mu.Lock()
	if o.ended || o.delivered >= bytes {
		o.mu.Unlock()
		return
	}
	w := waiter{bytes, make(chan struct{})}
	o.waiters = append(o.waiters, w)
	o.mu.Unlock()
	select {
	case <-w.ready:
	case <-ctx.Done():
		// The waiter stays until the stream's end: it is small, and a second drain is rare.
	}
}

// close ends the copy: the stream is closed, and a write that waits for a reader of the FIFO is ended by the close of
// the sink.
func (o *output) close() { o.end() }
