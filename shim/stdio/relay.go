// SPDX-License-Identifier: Apache-2.0

package stdio

import (
	"context"
	"fmt"
	"sync"

	"github.com/cloister-project/cloister/hypervisor/vsock"
)

// Config says where a process's bytes come from and go to.
type Config struct {
	// Namespace and ID of the container, for logging programs.
	Namespace, ID string
	// Stdin, Stdout and Stderr as in containerd's requests; empty for none.
	Stdin, Stdout, Stderr string
	// Terminal: output comes on stdout alone.
	Terminal bool
}

// Relay moves one process's bytes. It implements virtcontainers.ProcessIO.
type Relay struct {
	in       *input
	out, err *output
	loggers  []*logger

	mu       sync.Mutex
	attached bool
	closed   bool
}

// Open takes the host's ends of a process's streams, except stdin's; see [Relay.OpenStdin]. ctx bounds the start of logging
// programs. An error leaves nothing
// open.
func Open(ctx context.Context, c Config) (_ *Relay, err error) {
	r := &Relay{}
	defer func() {
		if err != nil {
			_ = r.Close()
		}
	}()
	if c.Stdin != "" {
		if r.in, err = newInput(c.Stdin); err != nil {
			return nil, fmt.Errorf("open stdin: %w", err)
		}
	}
	if c.Terminal {
		c.Stderr = ""
	}
	var sinks = map[string]*sink{}
	for _, s := range []struct {
		name, raw string
		stderr    bool
		to        **output
	}{{"stdout", c.Stdout, false, &r.out}, {"stderr", c.Stderr, true, &r.err}} {
		if s.raw == "" {
			continue
		}
		t, err := parseTarget(s.raw)
		if err != nil {
			return nil, err
		}
		to, err := r.sinkFor(ctx, c, t, s.stderr, sinks)
		if err != nil {
			return nil, fmt.Errorf("open %s: %w", s.name, err)
		}
		*s.to = newOutput(to)
	}
	for _, l := range r.loggers {
		l.closeUnused()
	}
	return r, nil
}

// sinkFor opens a target, or returns the one that is open already: stdout and stderr may be the same file.
func (r *Relay) sinkFor(ctx context.Context, c Config, t target, stderr bool, sinks map[string]*sink) (*sink, error) {
	if t.scheme == "binary" || t.scheme == "binary-v2" {
		for _, l := range r.loggers {
			if l.raw == t.raw {
				return l.sink(stderr), nil
			}
		}
		l, err := startLogger(ctx, t, c.Namespace, c.ID)
		if err != nil {
			return nil, err
		}
		r.loggers = append(r.loggers, l)
		return l.sink(stderr), nil
	}
	if s, ok := sinks[t.raw]; ok {
		s.share()
		return s, nil
	}
	f, err := openOutput(t)
	if err != nil {
		return nil, err
	}
	s := newSink(f)
	sinks[t.raw] = s
	return s, nil
}

// Attach takes the guest's streams over and starts to copy. A stream that nobody wants is closed.
func (r *Relay) Attach(stdin, stdout, stderr vsock.Conn) {
	r.mu.Lock()
	refuse := r.attached || r.closed
	r.attached = true
	r.mu.Unlock()
	if r.in == nil || refuse {
		closeConn(stdin)
	} else {
		r.in.attach(stdin)
	}
	for _, s := range []struct {
		o    *output
		conn vsock.Conn
	}{{r.out, stdout}, {r.err, stderr}} {
		if s.o == nil || refuse {
			closeConn(s.conn)
			continue
		}
		s.o.attach(s.conn)
	}
}

func closeConn(c vsock.Conn) {
	if c != nil {
		_ = c.Close()
	}
}

// OpenStdin opens the host's end of stdin. It is for the process's start, and not earlier: clients (ctr, nerdctl) write
// as soon as the FIFO has a reader, and one whose input ends before its request to make the process was answered
// forgets to say so; the process would wait for more for ever. The runc shim opens an exec's FIFOs at its start, too.
func (r *Relay) OpenStdin() error {
	if r.in == nil {
		return nil
	}
	if err := r.in.open(); err != nil {
		return fmt.Errorf("open stdin: %w", err)
	}
	return nil
}

// Drain waits until so many bytes of stdout and stderr were delivered, or all there will ever be, or ctx ends.
func (r *Relay) Drain(ctx context.Context, stdoutBytes, stderrBytes uint64) {
	if r.out != nil {
		r.out.drain(ctx, stdoutBytes)
	}
	if r.err != nil {
		r.err.drain(ctx, stderrBytes)
	}
}

// CloseStdin gives the process what is in the FIFO now and then the end of input. It does not wait for that, can be
// called before Attach, and is safe to repeat.
func (r *Relay) CloseStdin() {
	if r.in != nil {
		r.in.finish()
	}
}

// Close ends the relay; what was not delivered is lost. It does not block and is safe to repeat.
func (r *Relay) Close() error {
	r.mu.Lock()
	if r.closed {
		r.mu.Unlock()
		return nil
	}
	r.closed = true
	r.mu.Unlock()
	if r.in != nil {
		r.in.close()
	}
	for _, o := range []*output{r.out, r.err} {
		if o != nil {
			o.close()
		}
	}
	for _, l := range r.loggers {
		l.close()
	}
	return nil
}
