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

// input copies a FIFO (or a file) to the guest.
type input struct {
	f *os.File
	// detachable: f is a FIFO, and its having no writers is not the end of input.
	detachable bool

	mu        sync.Mutex
	conn      vsock.Conn
	finishing bool
	closed    bool
}

func openInput(raw string) (*input, error) {
	t, err := parseTarget(raw)
	if err != nil {
		return nil, err
	}
	f, isFIFO, err := openFIFO(t.path)
	if err != nil {
		return nil, err
	}
	if !isFIFO {
		if f, err = os.OpenFile(t.path, os.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY, 0); err != nil {
			return nil, kind(err)
		}
	}
	return &input{f: f, detachable: isFIFO}, nil
}

func (in *input) attach(conn vsock.Conn) {
	in.mu.Lock()
	if in.closed || conn == nil {
		in.mu.Unlock()
		closeConn(conn)
		in.close()
		return
	}
	in.conn = conn
	in.mu.Unlock()
	go in.copy(conn)
}

// finish asks for the end of input behind what is in the FIFO now.
func (in *input) finish() {
	in.mu.Lock()
	defer in.mu.Unlock()
	if in.finishing || in.closed {
		return
	}
	in.finishing = true
	// Wakes a copy that waits in Read; a file that has no deadlines has an end of its own.
	_ = in.f.SetReadDeadline(time.Unix(1, 0))
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
	_ = in.f.Close()
}

// close ends the copy. Safe to repeat.
func (in *input) close() {
	in.mu.Lock()
	in.closed = true
	conn := in.conn
	in.mu.Unlock()
	_ = in.f.Close()
	closeConn(conn)
}
