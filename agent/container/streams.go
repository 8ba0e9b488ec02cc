// SPDX-License-Identifier: Apache-2.0

package container

import (
	"fmt"
	"net"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	agentv1 "github.com/cloister-project/cloister/agent-protocol/v1"
	"github.com/cloister-project/cloister/agent-protocol/wire"
)

// streamPatience is how long a connected stream waits for a request that names it.
const streamPatience = 60 * time.Second

// Streams matches stdio connections with the processes that they belong to. Either may come first.
//
// A stream is unknown, then connected or expected, then both, then taken by its process, and unknown again after
// forget. Its mutex guards the map only; connections are closed outside of it.
type Streams struct {
	patience time.Duration

	mu        sync.Mutex
	slots     map[wire.StreamID]*slot
	unclaimed int
	closed    bool
}

type slot struct {
	conn     net.Conn    // nil until connected and after it was taken
	expected bool        // a process named it
	taken    bool        // its process has the connection
	timer    *time.Timer // drops it while nobody expects it
}

// NewStreams makes an empty registry.
func NewStreams() *Streams {
	return &Streams{patience: streamPatience, slots: map[wire.StreamID]*slot{}}
}

// Offer hands a fresh connection over. With an error the caller keeps it: its id is in use, or too many streams wait.
func (s *Streams) Offer(id wire.StreamID, conn net.Conn) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return errShutsDown()
	}
	if have, ok := s.slots[id]; ok {
		if have.conn != nil || have.taken {
			return fmt.Errorf("stream %s is connected already: %w", id, errdefs.ErrAlreadyExists)
		}
		have.conn = conn
		return nil
	}
	if s.unclaimed >= wire.MaxPendingStreams {
		return fmt.Errorf("%d streams are connected that no process has named: %w", s.unclaimed, errdefs.ErrResourceExhausted)
	}
	s.unclaimed++
	fresh := &slot{conn: conn}
	fresh.timer = time.AfterFunc(s.patience, func() { s.expire(id, fresh) })
	s.slots[id] = fresh
	return nil
}

func (s *Streams) expire(id wire.StreamID, late *slot) {
	s.mu.Lock()
	if s.slots[id] != late || late.expected {
		s.mu.Unlock()
		return
	}
	delete(s.slots, id)
	s.unclaimed--
	s.mu.Unlock()
	_ = late.conn.Close()
}

// expect reserves the streams of a process, all or none.
func (s *Streams) expect(ids []wire.StreamID) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return errShutsDown()
	}
	seen := make(map[wire.StreamID]bool, len(ids))
	for _, id := range ids {
		if have, ok := s.slots[id]; seen[id] || ok && have.expected {
			return fmt.Errorf("stream %s belongs to another stream of a process: %w", id, errdefs.ErrInvalidArgument)
		}
		seen[id] = true
	}
	for _, id := range ids {
		if have, ok := s.slots[id]; ok {
			have.expected = true
			have.timer.Stop()
			s.unclaimed--
		} else {
			s.slots[id] = &slot{expected: true}
		}
	}
	return nil
}

// take gives the connections of expected streams to their process, all or none.
func (s *Streams) take(ids []wire.StreamID) ([]net.Conn, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, id := range ids {
		if have, ok := s.slots[id]; !ok || have.conn == nil {
			return nil, fmt.Errorf("stdio stream %s is not connected: connect it before StartProcess: %w", id, errdefs.ErrFailedPrecondition)
		}
	}
	conns := make([]net.Conn, 0, len(ids))
	for _, id := range ids {
		have := s.slots[id]
		conns = append(conns, have.conn)
		have.conn, have.taken = nil, true
	}
	return conns, nil
}

// Claim hands out a connected stream that no process has named. It is the caller's then, and its id unknown again.
func (s *Streams) Claim(id wire.StreamID) (net.Conn, error) {
	ids := []wire.StreamID{id}
	if err := s.expect(ids); err != nil {
		return nil, err
	}
	defer s.forget(ids)
	conns, err := s.take(ids)
	if err != nil {
		return nil, err
	}
	return conns[0], nil
}

// forget ends the reservation of a process. Connections that it has not taken are closed.
func (s *Streams) forget(ids []wire.StreamID) {
	var left []net.Conn
	s.mu.Lock()
	for _, id := range ids {
		if have, ok := s.slots[id]; ok && have.expected {
			if have.conn != nil {
				left = append(left, have.conn)
			}
			delete(s.slots, id)
		}
	}
	s.mu.Unlock()
	for _, conn := range left {
		_ = conn.Close()
	}
}

// Close drops every stream that waits and refuses further ones.
func (s *Streams) Close() {
	var left []net.Conn
	s.mu.Lock()
	s.closed = true
	for id, have := range s.slots {
		if have.timer != nil {
			have.timer.Stop()
		}
		if have.conn != nil {
			left = append(left, have.conn)
			delete(s.slots, id)
		}
	}
	s.unclaimed = 0
	s.mu.Unlock()
	for _, conn := range left {
		_ = conn.Close()
	}
}

// stdioSpec is a checked agentv1.Stdio.
type stdioSpec struct {
	stdin, stdout, stderr *wire.StreamID
	terminal              bool
	width, height         uint16
}

func parseStdio(in *agentv1.Stdio) (stdioSpec, error) {
	out := stdioSpec{terminal: in.GetTerminal()}
	for _, f := range []struct {
		name, id string
		into     **wire.StreamID
	}{{"stdin", in.GetStdin(), &out.stdin}, {"stdout", in.GetStdout(), &out.stdout}, {"stderr", in.GetStderr(), &out.stderr}} {
		if f.id == "" {
			continue
		}
		id, err := wire.ParseStreamID(f.id)
		if err != nil {
			return out, refused("stdio.%s: %v", f.name, err)
		}
		*f.into = &id
	}
	if out.terminal && out.stderr != nil {
		return out, refused("stdio: a terminal has no stderr")
	}
	var err error
	out.width, out.height, err = windowSize(in.GetWidth(), in.GetHeight())
	return out, err
}

// windowSize checks the size of a terminal in character cells.
func windowSize(width, height uint32) (uint16, uint16, error) {
	if width > 0xffff || height > 0xffff {
		return 0, 0, refused("a terminal of %d by %d is larger than 65535", width, height)
	}
	return uint16(width), uint16(height), nil
}

// ids lists the streams in the order stdin, stdout, stderr.
func (s *stdioSpec) ids() []wire.StreamID {
	var out []wire.StreamID
	for _, id := range []*wire.StreamID{s.stdin, s.stdout, s.stderr} {
		if id != nil {
			out = append(out, *id)
		}
	}
	return out
}
