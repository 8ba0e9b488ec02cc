// SPDX-License-Identifier: Apache-2.0

package qmp

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
)

const (
	// MaxMessage bounds one message of QEMU, in bytes. The largest honest one, query-qmp-schema's reply, has less than 1 MiB.
	MaxMessage = 4 << 20
	// maxEvents bounds the events that wait for the handler.
	maxEvents = 4096
	// maxEventBytes bounds the data of the events that wait for the handler.
	maxEventBytes = 1 << 20
	// writeTimeout is for a QEMU whose main loop does not read any more.
	writeTimeout = 10 * time.Second
)

// ErrClosed is wrapped by Execute after Close.
var ErrClosed = errors.New("QMP connection closed")

// Event is something QEMU reports on its own.
type Event struct {
	Name string
	// Data is the event's own JSON object; nil if it has none.
	Data json.RawMessage
	Time time.Time
}

// Error is QEMU's refusal of a command.
type Error struct {
	Command string
	// Class is GenericError, CommandNotFound, DeviceNotActive, DeviceNotFound or KVMMissingCap.
	Class string
	Desc  string
}

func (e *Error) Error() string { return fmt.Sprintf("QEMU refused %s: %s", e.Command, e.Desc) }

// Is maps QEMU's error classes to errdefs kinds.
func (e *Error) Is(target error) bool {
	switch target {
	case errdefs.ErrNotFound:
		return e.Class == "DeviceNotFound"
	case errdefs.ErrNotImplemented:
		return e.Class == "CommandNotFound"
	}
	return false
}

// Client is one QMP session. Its methods may be called from any goroutine.
type Client struct {
	conn    net.Conn
	handler func(Event)
	writing chan struct{} // semaphore of one: holds a token while a message is written

	mu      sync.Mutex
	nextID  uint64
	pending map[uint64]chan<- reply
	err     error // why the session ended; set once

	events *eventQueue
	done   chan struct{}
}

type reply struct {
	result json.RawMessage
	err    *Error
}

// message is any of QEMU's messages.
type message struct {
	Greeting  json.RawMessage `json:"QMP"`
	Return    json.RawMessage `json:"return"`
	Error     *wireError      `json:"error"`
	ID        *uint64         `json:"id"`
	Event     string          `json:"event"`
	Data      json.RawMessage `json:"data"`
	Timestamp struct {
		Seconds      int64 `json:"seconds"`
		Microseconds int64 `json:"microseconds"`
	} `json:"timestamp"`
}

type wireError struct {
	Class string `json:"class"`
	Desc  string `json:"desc"`
}

// New starts a session on conn: it reads QEMU's greeting and leaves negotiation mode. It takes conn over, on errors
// too. handler is called for each event, one at a time, and may take its time; it may be nil.
func New(ctx context.Context, conn net.Conn, handler func(Event)) (*Client, error) {
	if handler == nil {
		handler = func(Event) {}
	}
	c := &Client{
		conn:    conn,
		handler: handler,
		writing: make(chan struct{}, 1),
		pending: make(map[uint64]chan<- reply),
		events:  newEventQueue(),
		done:    make(chan struct{}),
	}
	greeted := make(chan struct{})
	go c.run(greeted)
	select {
	case <-greeted:
	case <-c.done:
		return nil, fmt.Errorf("QMP greeting: %w", c.Err())
	case <-ctx.Done():
		c.Close()
		<-c.done
		return nil, fmt.Errorf("wait for QEMU's QMP greeting: %w", context.Cause(ctx))
	}
	if err := c.Execute(ctx, "qmp_capabilities", nil, nil); err != nil {
		c.Close()
		<-c.done
		return nil, err
	}
	return c, nil
}

// Execute runs a command and decodes its result into result, which may be nil. QEMU's refusal is an *Error. If ctx ends
// before the reply, the command may still be executed.
func (c *Client) Execute(ctx context.Context, command string, arguments, result any) error {
	got := make(chan reply, 1)
	c.mu.Lock()
	if c.err != nil {
		c.mu.Unlock()
		return fmt.Errorf("QMP %s: %w", command, c.err)
	}
	c.nextID++
	id := c.nextID
	c.pending[id] = got
	c.mu.Unlock()

	if err := c.send(ctx, id, command, arguments); err != nil {
		c.forget(id)
		return fmt.Errorf("QMP %s: %w", command, err)
	}
	select {
	case r := <-got:
		return finish(command, r, result)
	case <-ctx.Done():
		c.forget(id)
		return fmt.Errorf("QMP %s: %w", command, context.Cause(ctx))
	case <-c.done:
		select {
		case r := <-got: // the reply came just before the end
			return finish(command, r, result)
		default:
		}
		return fmt.Errorf("QMP %s: %w", command, c.Err())
	}
}

func finish(command string, r reply, result any) error {
	if r.err != nil {
		r.err.Command = command
		return r.err
	}
	if result == nil {
		return nil
	}
	if err := json.Unmarshal(r.result, result); err != nil {
		return fmt.Errorf("QMP %s: reply that is not understood: %w", command, err)
	}
	return nil
}

func (c *Client) forget(id uint64) {
	c.mu.Lock()
	delete(c.pending, id)
	c.mu.Unlock()
}

func (c *Client) send(ctx context.Context, id uint64, command string, arguments any) error {
	b, err := json.Marshal(struct {
		Execute   string `json:"execute"`
		Arguments any    `json:"arguments,omitempty"`
		ID        uint64 `json:"id"`
	}{command, arguments, id})
	if err != nil {
		return err
	}
	select {
	case c.writing <- struct{}{}:
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-c.done:
		return c.Err()
	}
	defer func() { <-c.writing }()
	if err := c.conn.SetWriteDeadline(time.Now().Add(writeTimeout)); err != nil {
		return err
	}
	if _, err := c.conn.Write(append(b, '\n')); err != nil {
		if errors.Is(err, os.ErrDeadlineExceeded) {
			err = fmt.Errorf("QEMU did not read a command for %v: %w", writeTimeout, errdefs.ErrUnavailable)
		}
		// Half a message may be out: nothing can follow it.
		c.fail(err)
		return err
	}
	return nil
}

// Close ends the session. It waits for no handler; see Done. It is safe to repeat.
func (c *Client) Close() error {
	c.fail(ErrClosed)
	return nil
}

// Done is closed when the session has ended and the last event was handled.
func (c *Client) Done() <-chan struct{} { return c.done }

// Err tells why the session ended: ErrClosed after Close, io.EOF (wrapped) where QEMU closed it. nil while it lasts.
func (c *Client) Err() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

// fail ends the session for the first reason given.
func (c *Client) fail(err error) {
	c.mu.Lock()
	if c.err == nil {
		c.err = err
	}
	c.mu.Unlock()
	c.conn.Close()
}

// run is the reader; it owns the dispatcher.
func (c *Client) run(greeted chan<- struct{}) {
	dispatched := make(chan struct{})
	go func() {
		defer close(dispatched)
		c.events.drain(c.handler)
	}()
	err := c.read(greeted)
	if errors.Is(err, io.EOF) || errors.Is(err, syscall.ECONNRESET) {
		// A reset instead of the end is what a QEMU leaves that died with a command unread.
		err = fmt.Errorf("QEMU closed the QMP connection: %w", io.EOF)
	}
	c.fail(err)
	c.events.close()
	<-dispatched
	close(c.done)
}

func (c *Client) read(greeted chan<- struct{}) error {
	r := bufio.NewReaderSize(c.conn, 4<<10)
	for {
		line, err := readLine(r, MaxMessage)
		if err != nil {
			return err
		}
		if len(bytes.TrimSpace(line)) == 0 {
			continue
		}
		var m message
		if err := json.Unmarshal(line, &m); err != nil {
			return fmt.Errorf("QMP message that is not understood: %w", err)
		}
		switch {
		case m.Event != "":
			e := Event{Name: m.Event, Data: m.Data, Time: time.Unix(m.Timestamp.Seconds, m.Timestamp.Microseconds*1000)}
			if err := c.events.put(e); err != nil {
				return err
			}
		case m.Error != nil || m.Return != nil:
			if err := c.deliver(m); err != nil {
				return err
			}
		case m.Greeting != nil:
			if greeted != nil {
				close(greeted)
				greeted = nil
			}
		}
		// Anything else is a later QEMU's business.
	}
}

// deliver gives a reply to whom it is for. One that nobody waits for any more is dropped.
func (c *Client) deliver(m message) error {
	if m.ID == nil {
		// QEMU could not parse what it got. This cannot be given to a caller, and should not happen.
		if m.Error != nil {
			return fmt.Errorf("QEMU did not understand a message: %s", m.Error.Desc)
		}
		return nil
	}
	c.mu.Lock()
	ch := c.pending[*m.ID]
	delete(c.pending, *m.ID)
	c.mu.Unlock()
	if ch == nil {
		return nil
	}
	r := reply{result: m.Return}
	if m.Error != nil {
		r.err = &Error{Class: m.Error.Class, Desc: m.Error.Desc}
	}
	ch <- r // has room: each id gets one reply
	return nil
}

// readLine returns the next line, of at most limit bytes. The slice is valid until the next call or owned by nobody.
func readLine(r *bufio.Reader, limit int) ([]byte, error) {
	var long []byte
	for {
		part, err := r.ReadSlice('\n')
		if len(long)+len(part) > limit {
			return nil, fmt.Errorf("QMP message of more than %d bytes: %w", limit, errdefs.ErrResourceExhausted)
		}
		switch {
		case err == nil && long == nil:
			return part, nil
		case err == nil:
			return append(long, part...), nil
		case errors.Is(err, bufio.ErrBufferFull):
			long = append(long, part...)
		default:
			return nil, err
		}
	}
}
