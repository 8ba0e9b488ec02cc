// SPDX-License-Identifier: Apache-2.0

package supervise

import (
	"errors"
	"io"
	"os"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

const (
	// tailSize is how much of a log is kept in memory, in bytes.
	tailSize = 64 << 10
	// MaxLogFile bounds a log on disk: two files of half of it, the older one with the suffix ".1".
	MaxLogFile = 1 << 20
	// quotedSize and quotedLines bound what an Exit quotes of a log.
	quotedSize  = 4 << 10
	quotedLines = 40
	// causeLines of them are for what stands before a panic.
	causeLines = 10
)

// Tail keeps the end of a log that somebody untrusted writes: in memory and in a file, both bounded, without control
// characters.
type Tail struct {
	path string

	mu      sync.Mutex
	clean   cleaner
	ring    []byte // grows to tailSize, then wraps at pos
	pos     int
	file    *os.File // nil after an error: the log on disk is a convenience
	written int64
	changed chan struct{} // closed and replaced at each write
}

// NewTail makes the log's file, which must not exist.
func NewTail(path string) (*Tail, error) {
	f, err := createLog(path)
	if err != nil {
		return nil, err
	}
	return &Tail{path: path, file: f, changed: make(chan struct{})}, nil
}

func createLog(path string) (*os.File, error) {
	return os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL|unix.O_NOFOLLOW, 0o600)
}

// CopyFrom reads r to its end.
func (t *Tail) CopyFrom(r io.Reader) {
	buf := make([]byte, 4<<10)
	for {
		n, err := r.Read(buf)
		t.write(buf[:n])
		if err != nil {
			return
		}
	}
}

func (t *Tail) write(p []byte) {
	if len(p) == 0 {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	p = t.clean.filter(p)
	t.keep(p)
	// The lock is this log's alone and the file is a local one: nobody waits for it but a reader of the tail.
	t.store(p)
	close(t.changed)
	t.changed = make(chan struct{})
}

func (t *Tail) keep(p []byte) {
	if len(p) > tailSize {
		p = p[len(p)-tailSize:]
	}
	if room := tailSize - len(t.ring); room > 0 {
		n := min(room, len(p))
		t.ring = append(t.ring, p[:n]...)
		p = p[n:]
	}
	for len(p) > 0 {
		n := copy(t.ring[t.pos:], p)
		t.pos = (t.pos + n) % tailSize
		p = p[n:]
	}
}

func (t *Tail) store(p []byte) {
	if t.file == nil {
		return
	}
	if t.written+int64(len(p)) > MaxLogFile/2 {
		t.file.Close()
		t.file, t.written = nil, 0
		if os.Rename(t.path, t.path+".1") != nil {
			return
		}
		f, err := createLog(t.path)
		if err != nil {
			return
		}
		t.file = f
	}
	n, err := t.file.Write(p)
	t.written += int64(n)
	if err != nil {
		t.file.Close()
		t.file = nil
	}
}

// Close closes the file; the tail can still be read.
func (t *Tail) Close() {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.file != nil {
		t.file.Close()
		t.file = nil
	}
}

// Remove removes the log's files.
func (t *Tail) Remove() error {
	t.Close()
	err := os.Remove(t.path)
	if e := os.Remove(t.path + ".1"); e != nil && !errors.Is(e, os.ErrNotExist) {
		err = errors.Join(err, e)
	}
	return err
}

// Text is all that is kept in memory, and a channel that is closed when there is more.
func (t *Tail) Text() (string, <-chan struct{}) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return string(t.ring[t.pos:]) + string(t.ring[:t.pos]), t.changed
}

// Quote is the end of the log for an error message.
func (t *Tail) Quote() string {
	s, _ := t.Text()
	return quoteEnd(s)
}

// QuoteAround is Quote, with what stands before the first mark in front if a long text after it pushed it out: why PID 1
// gave up stands before the kernel's panic, and a trace of the kernel's stack after it.
func (t *Tail) QuoteAround(mark string) string {
	s, _ := t.Text()
	end := quoteEnd(s)
	before, after, found := strings.Cut(s, mark)
	if !found || strings.Contains(end, mark) && len(strings.Split(after, "\n")) < quotedLines-causeLines {
		return end
	}
	line, _, _ := strings.Cut(after, "\n")
	cause := strings.Split(quoteEnd(before+mark+line), "\n")
	cause = cause[max(0, len(cause)-causeLines):]
	trace := strings.Split(end, "\n")
	trace = trace[min(len(trace), len(cause)+1):]
	return strings.Join(cause, "\n") + "\n[...]\n" + strings.Join(trace, "\n")
}

func quoteEnd(s string) string {
	s = strings.TrimSpace(s)
	if len(s) > quotedSize {
		s = s[len(s)-quotedSize:]
		// From a whole line on, if there is one.
		if i := strings.IndexByte(s, '\n'); i >= 0 {
			s = s[i+1:]
		}
		s = strings.ToValidUTF8(s, "")
	}
	lines := strings.Split(s, "\n")
	if len(lines) > quotedLines {
		lines = lines[len(lines)-quotedLines:]
	}
	return strings.Join(lines, "\n")
}
