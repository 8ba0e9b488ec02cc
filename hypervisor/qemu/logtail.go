// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"errors"
	"io"
	"os"
	"strings"
	"sync"
	"unicode"
	"unicode/utf8"

	"golang.org/x/sys/unix"
)

const (
	// tailSize is how much of a log is kept in memory, in bytes.
	tailSize = 64 << 10
	// maxLogFile bounds a log on disk: two files of half of it, the older one with the suffix ".1".
	maxLogFile = 1 << 20
	// quotedSize and quotedLines bound what an Exit quotes of a log.
	quotedSize  = 4 << 10
	quotedLines = 40
	// causeLines of them are for what stands before a panic.
	causeLines = 10
)

// tail keeps the end of a log that somebody untrusted writes: in memory and in a file, both bounded, without control
// characters.
type tail struct {
	path string

	mu      sync.Mutex
	clean   cleaner
	ring    []byte // grows to tailSize, then wraps at pos
	pos     int
	file    *os.File // nil after an error: the log on disk is a convenience
	written int64
	changed chan struct{} // closed and replaced at each write
}

// newTail makes the log's file, which must not exist.
func newTail(path string) (*tail, error) {
	f, err := createLog(path)
	if err != nil {
		return nil, err
	}
	return &tail{path: path, file: f, changed: make(chan struct{})}, nil
}

func createLog(path string) (*os.File, error) {
	return os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL|unix.O_NOFOLLOW, 0o600)
}

// copyFrom reads r to its end.
func (t *tail) copyFrom(r io.Reader) {
	buf := make([]byte, 4<<10)
	for {
		n, err := r.Read(buf)
		t.write(buf[:n])
		if err != nil {
			return
		}
	}
}

func (t *tail) write(p []byte) {
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

func (t *tail) keep(p []byte) {
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

func (t *tail) store(p []byte) {
	if t.file == nil {
		return
	}
	if t.written+int64(len(p)) > maxLogFile/2 {
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

// close closes the file; the tail can still be read.
func (t *tail) close() {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.file != nil {
		t.file.Close()
		t.file = nil
	}
}

// remove removes the log's files.
func (t *tail) remove() error {
	t.close()
	err := os.Remove(t.path)
	if e := os.Remove(t.path + ".1"); e != nil && !errors.Is(e, os.ErrNotExist) {
		err = errors.Join(err, e)
	}
	return err
}

// text is all that is kept in memory, and a channel that is closed when there is more.
func (t *tail) text() (string, <-chan struct{}) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return string(t.ring[t.pos:]) + string(t.ring[:t.pos]), t.changed
}

// quote is the end of the log for an error message.
func (t *tail) quote() string {
	s, _ := t.text()
	return quoteEnd(s)
}

// quoteAround is quote, with what stands before the first mark in front if a long text after it pushed it out: why PID 1
// gave up stands before the kernel's panic, and a trace of the kernel's stack after it.
func (t *tail) quoteAround(mark string) string {
	s, _ := t.text()
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

// cleaner removes control characters and terminal sequences from a stream, whatever its pieces are.
type cleaner struct {
	state   cleanState
	partial []byte // a rune's first bytes, less than utf8.UTFMax
}

type cleanState byte

const (
	cleanText   cleanState = iota
	cleanEscape            // after ESC
	cleanCSI               // in a control sequence, up to its final byte
)

func (c *cleaner) filter(p []byte) []byte {
	p = append(c.partial, p...)
	c.partial = nil
	out := make([]byte, 0, len(p))
	for len(p) > 0 {
		if !utf8.FullRune(p) {
			c.partial = append([]byte(nil), p...)
			break
		}
		r, n := utf8.DecodeRune(p)
		p = p[n:]
		switch c.state {
		case cleanEscape:
			c.state = cleanText
			if r == '[' {
				c.state = cleanCSI
			}
			continue
		case cleanCSI:
			if r >= 0x40 && r <= 0x7e {
				c.state = cleanText
				continue
			}
			if r >= 0x20 && r < 0x40 {
				continue
			}
			c.state = cleanText // not a sequence after all
		}
		switch {
		case r == 0x1b:
			c.state = cleanEscape
		case r == '\n' || r == '\t':
			out = append(out, byte(r))
		case r == utf8.RuneError:
			out = append(out, '?')
		case unicode.IsPrint(r):
			out = utf8.AppendRune(out, r)
		}
	}
	return out
}
