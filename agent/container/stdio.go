// SPDX-License-Identifier: Apache-2.0

package container

import (
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// chunk is how much one read of a stream takes: the size of a Linux pipe.
	chunk = 64 << 10
	// stallLimit is how long an exited process's output may make no progress before its exit is reported without it.
	stallLimit = 10 * time.Second
)

// chunks holds buffers between reads. A stream borrows one only while it has data, so that idle streams cost none.
var chunks = sync.Pool{New: func() any { b := make([]byte, chunk); return &b }}

// output copies what a process writes to a stream.
//
// The process's exit and the end of its output are two things: a child in the background may keep the pipe open. On
// exited the copier reads what is in the pipe at that moment, without waiting, closes drained, and carries on until EOF.
//
// When the stream breaks, the copier reads on and drops the data, so that the process does not block or die of it.
type output struct {
	src  *os.File // non-blocking read end of a pipe, or the master of a terminal
	dst  net.Conn // nil: drop what is read
	read atomic.Uint64
	// moved counts chunks that went out, for the stall check.
	moved    atomic.Uint64
	drained  chan struct{}
	finished chan struct{}
}

func startOutput(src *os.File, dst net.Conn) *output {
	o := &output{src: src, dst: dst, drained: make(chan struct{}), finished: make(chan struct{})}
	go o.run()
	return o
}

func (o *output) run() {
	defer close(o.finished)
	drained := false
	finish := func() {
		if !drained {
			drained = true
			close(o.drained)
		}
	}
	defer finish()
	raw, err := o.src.SyscallConn()
	if err != nil {
		return
	}
	draining := 0 // how much of what the process wrote may still be unread
	for {
		buf, n, err := readChunk(raw, draining > 0)
		if n > 0 {
			o.read.Add(uint64(n))
			o.write((*buf)[:n])
			o.moved.Add(1)
		}
		if buf != nil {
			chunks.Put(buf)
		}
		switch {
		case n > 0:
			if draining > 0 {
				if draining -= n; draining <= 0 {
					finish()
				}
			}
		case errors.Is(err, os.ErrDeadlineExceeded):
			// exited set the deadline to wake us up.
			if o.src.SetReadDeadline(time.Time{}) != nil {
				return
			}
			if draining = pending(raw); draining == 0 {
				finish()
			}
		case errors.Is(err, unix.EAGAIN):
			draining = 0
			finish()
		default: // EOF, or EIO: the last slave of the terminal is closed
			if c, ok := o.dst.(interface{ CloseWrite() error }); ok {
				_ = c.CloseWrite()
			}
			return
		}
	}
}

// pending tells how much is in a pipe now. What a child in the background adds later is not its parent's, and waiting for
// an empty pipe would wait for ever if it never stops. Of a terminal, whose kernel buffers are smaller and have no exact
// count, it is a bound that ends the wait.
func pending(raw syscall.RawConn) int {
	const terminal = 256 << 10
	n := terminal
	_ = raw.Control(func(fd uintptr) {
		if _, err := unix.FcntlInt(fd, unix.F_GETPIPE_SZ, 0); err != nil {
			return
		}
		if k, err := unix.IoctlGetInt(int(fd), unix.TIOCINQ); err == nil {
			n = k
		}
	})
	return n
}

func (o *output) write(p []byte) {
	if o.dst == nil {
		return
	}
	if _, err := o.dst.Write(p); err != nil {
		_ = o.dst.Close()
		o.dst = nil
	}
}

// readChunk reads once. It waits for data unless nowait is set, and then fails with EAGAIN. The buffer is nil if
// nothing was read. At the end of the file the error is io.EOF.
func readChunk(raw syscall.RawConn, nowait bool) (*[]byte, int, error) {
	var (
		buf    *[]byte
		n      int
		sysErr error
	)
	err := raw.Read(func(fd uintptr) bool {
		buf = chunks.Get().(*[]byte)
		for {
			n, sysErr = unix.Read(int(fd), *buf)
			if sysErr != unix.EINTR {
				break
			}
		}
		if n > 0 {
			return true
		}
		chunks.Put(buf)
		buf, n = nil, 0
		return nowait || sysErr != unix.EAGAIN
	})
	switch {
	case buf != nil:
		return buf, n, nil
	case err != nil:
		return nil, 0, err
	case sysErr != nil:
		return nil, 0, sysErr
	}
	return nil, 0, io.EOF
}

// exited tells the copier that the process is gone; drained is closed when everything that it wrote has been read.
func (o *output) exited() {
	// A deadline in the past is how a goroutine that waits in the runtime's poller is woken up.
	if o.src.SetReadDeadline(time.Unix(1, 0)) != nil {
		// Closed already: the copier ends by itself.
		return
	}
}

// waitDrained waits for drained, and gives up when the host has taken nothing for stall.
func (o *output) waitDrained(stall time.Duration) {
	seen := o.moved.Load()
	timer := time.NewTimer(stall)
	defer timer.Stop()
	for {
		select {
		case <-o.drained:
			return
		case <-timer.C:
			now := o.moved.Load()
			if now == seen {
				return
			}
			seen = now
			timer.Reset(stall)
		}
	}
}

// input copies a stream to a process's stdin. EOF is in band: when the host half-closes the stream the write end of the
// pipe is closed after the last byte.
//
// A terminal gets no EOF: there, end of input is a character that the person at the other end types. Writing ^D for
// them would be wrong in raw mode, and the shim of runc does not do it either.
type input struct {
	src      net.Conn
	dst      *os.File
	terminal bool
	finished chan struct{}
}

func startInput(src net.Conn, dst *os.File, terminal bool) *input {
	i := &input{src: src, dst: dst, terminal: terminal, finished: make(chan struct{})}
	go i.run()
	return i
}

func (i *input) run() {
	defer close(i.finished)
	defer func() {
		if !i.terminal {
			_ = i.dst.Close()
		}
	}()
	read := func() (*[]byte, int, error) {
		buf := chunks.Get().(*[]byte)
		n, err := i.src.Read(*buf)
		return buf, n, err
	}
	if c, ok := i.src.(syscall.Conn); ok {
		if raw, err := c.SyscallConn(); err == nil {
			read = func() (*[]byte, int, error) { return readChunk(raw, false) }
		}
	}
	for {
		buf, n, err := read()
		if n > 0 {
			_, werr := i.dst.Write((*buf)[:n])
			if werr != nil {
				// Nobody reads stdin any more. The host learns it from its next write.
				_ = i.src.Close()
				err = werr
			}
		}
		if buf != nil {
			chunks.Put(buf)
		}
		if err != nil {
			return
		}
	}
}

// stop ends the copier. A terminal's master stays open for the output.
func (i *input) stop() {
	_ = i.src.Close()
	if i.terminal {
		_ = i.dst.SetWriteDeadline(time.Unix(1, 0)) // wakes up a copier that waits for a full terminal
	} else {
		_ = i.dst.Close()
	}
	<-i.finished
}
