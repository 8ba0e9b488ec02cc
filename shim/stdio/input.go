// SPDX-License-Identifier: Apache-2.0

package stdio

import (
	"errors"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cloister-project/cloister/hypervisor/vsock"
)

// input copies a FIFO (or a file) to the guest, from when it has both on.
type input struct {
	path string

	mu sync.Mutex
	// f is nil until open; it does not change any more then.
	f         *os.File
	conn      vsock.Conn
	finishing bool
	closed    bool
}

func newInput(raw string) (*input, error) {
	t, err := parseTarget(raw)
	if err != nil {
		return nil, err
	}
	if _, err := os.Stat(t.path); err != nil {
		return nil, kind(err)
	}
	return &input{path: t.path}, nil
}

// open opens the host's end. A client that waits for that (a FIFO has to have a reader) goes on.
func (in *input) open() error {
	f, isFIFO, err := openFIFO(in.path)
	if err != nil {
		return err
	}
	if !isFIFO {
		if f, err = os.OpenFile(in.path, os.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY, 0); err != nil {
			return kind(err)
		}
	}
	in.mu.Lock()
	defer in.mu.Unlock()
	if in.closed || in.f != nil {
		return f.Close()
	}
	in.f = f
	if in.finishing {
		in.interrupt()
	}
	if in.conn != nil {
		go in.copy(in.conn)
	}
	return nil
}

func (in *input) attach(conn vsock.Conn) {
	in.mu.Lock()
	defer in.mu.Unlock()
	if in.closed || conn == nil {
		closeConn(conn)
		in.closed = true
		in.closeFile()
		return
	}
	in.conn = conn
	if in.f != nil {
		go in.copy(conn)
	}
}

// closeFile is called with mu held.
func (in *input) closeFile() {
	if in.f != nil {
		_ = in.f.Close()
	}
}

// interrupt wakes a copy that waits in Read; a file that has no deadlines has an end of its own.
func (in *input) interrupt() { _ = in.f.SetReadDeadline(time.Unix(1, 0)) }

// finish asks for the end of input behind what is in the FIFO now.
func (in *input) finish() {
	in.mu.Lock()
	defer in.mu.Unlock()
	if in.finishing || in.closed {
		return
	}
	in.finishing = true
	if in.f != nil {
		in.interrupt()
	}
}

func (in *input) isFinishing() bool {
	in.mu.Lock()
	defer in.mu.Unlock()
	return in.finishing
}

func (in *input) copy(conn vsock.Conn) {
	buf := make([]byte, smallBuffer)
	for {
		n, err := in.f.Read(buf)
		if n > 0 {
			if _, werr := conn.Write(buf[:n]); werr != nil {
				// The process closed its stdin or has gone. Whoever writes to the FIFO is to know.
				in.close()
				return
			}
		}
		switch {
		case err == nil && n > 0:
			// A full buffer is the start of a burst: go on with a large one until it is over.
			if n == smallBuffer && !in.burst(conn) {
				return
			}
		case errors.Is(err, os.ErrDeadlineExceeded) && in.isFinishing():
			in.last(conn)
			return
		default:
			// The end of a file, or close.
			if !in.isClosed() {
				_ = conn.CloseWrite()
			}
			in.release()
			return
		}
	}
}

func (in *input) isClosed() bool {
	in.mu.Lock()
	defer in.mu.Unlock()
	return in.closed
}

// burst copies with a large buffer what can be read without waiting; false when the stream has ended.
func (in *input) burst(conn vsock.Conn) bool {
	buf := buffers.Get().(*[]byte)
	defer buffers.Put(buf)
	for {
		n, err := in.f.SyscallConn()
		if err != nil {
			return true // copy's own Read finds the same
		}
		got, rerr := readNow(n, *buf)
		if got > 0 {
			if _, err := conn.Write((*buf)[:got]); err != nil {
				in.close()
				return false
			}
		}
		if rerr != nil || got < smallBuffer {
			return true
		}
	}
}

// last copies what is in the FIFO without waiting for more, and then ends the guest's stream. What a client wrote
// before it asked for the end is in the FIFO or was read already.
func (in *input) last(conn vsock.Conn) {
	_ = in.f.SetReadDeadline(time.Time{})
	raw, err := in.f.SyscallConn()
	buf := buffers.Get().(*[]byte)
	defer buffers.Put(buf)
	for err == nil {
		var n int
		n, err = readNow(raw, *buf)
		if n <= 0 {
			break
		}
		if _, werr := conn.Write((*buf)[:n]); werr != nil {
			break
		}
	}
	_ = conn.CloseWrite()
	in.release()
}

// release closes the host's end and keeps the guest's stream: it is half open, and closing it whole would look like a
// reset to data that is still on its way.
func (in *input) release() {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.closeFile()
}

// close ends the copy. Safe to repeat.
func (in *input) close() {
	in.mu.Lock()
	in.closed = true
	conn := in.conn
	in.closeFile()
	in.mu.Unlock()
	closeConn(conn)
}
