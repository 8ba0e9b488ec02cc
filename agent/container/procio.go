// SPDX-License-Identifier: Apache-2.0

package container

import (
	"fmt"
	"net"
	"os"
	"sync"
	"time"

	"github.com/opencontainers/runc/libcontainer"
	"github.com/opencontainers/runc/libcontainer/utils"
	"golang.org/x/sys/unix"
)

// processIO is the stdio of one process: first the file descriptors (open, childStarted), then the copiers (attach),
// at its exit the drain (exited), and at last close. It is safe to close at any of these points, and twice.
type processIO struct {
	spec  stdioSpec
	stall time.Duration

	mu      sync.Mutex
	child   []*os.File // ends that the process gets, closed once it has them
	stdin   *os.File   // our ends
	stdout  *os.File
	stderr  *os.File
	console *os.File // our end of the socket over which libcontainer sends the terminal's master
	master  *os.File
	width   uint16
	height  uint16
	conns   []net.Conn
	in      *input
	out     *output
	err     *output
	closed  bool
}

func newProcessIO(spec stdioSpec) *processIO {
	return &processIO{spec: spec, stall: stallLimit, width: spec.width, height: spec.height}
}

// open makes the descriptors and puts the process's ends into p. owner and group own the pipes (the root user of the
// container's user namespace).
func (io *processIO) open(p *libcontainer.Process, owner, group int) (err error) {
	io.mu.Lock()
	defer io.mu.Unlock()
	defer func() {
		if err != nil {
			io.closeLocked()
		}
	}()
	if io.spec.terminal {
		parent, child, err := utils.NewSockPair("console")
		if err != nil {
			return fmt.Errorf("make the console socket: %w", err)
		}
		io.console, io.child = parent, []*os.File{child}
		p.ConsoleSocket = child
		if io.width != 0 && io.height != 0 {
			p.ConsoleWidth, p.ConsoleHeight = io.width, io.height
		}
		return nil
	}
	// Streams that the host does not want stay nil, which is /dev/null.
	if io.spec.stdin != nil {
		r, w, err := newPipe(false, owner, group)
		if err != nil {
			return err
		}
		io.stdin, io.child = w, append(io.child, r)
		p.Stdin = r
	}
	if io.spec.stdout != nil {
		r, w, err := newPipe(true, owner, group)
		if err != nil {
			return err
		}
		io.stdout, io.child = r, append(io.child, w)
		p.Stdout = w
	}
	if io.spec.stderr != nil {
		r, w, err := newPipe(true, owner, group)
		if err != nil {
			return err
		}
		io.stderr, io.child = r, append(io.child, w)
		p.Stderr = w
	}
	return nil
}

// newPipe makes a pipe whose one end is ours, and non-blocking: the read end if ours is set, else the write end. The
// other end stays blocking, since the flag belongs to the open file that the process inherits.
func newPipe(readIsOurs bool, owner, group int) (r, w *os.File, err error) {
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC); err != nil {
		return nil, nil, fmt.Errorf("make a pipe: %w", err)
	}
	ours := fds[1]
	if readIsOurs {
		ours = fds[0]
	}
	err = unix.SetNonblock(ours, true)
	for _, fd := range fds {
		if err == nil && (owner != 0 || group != 0) {
			err = unix.Fchown(fd, owner, group)
		}
	}
	if err != nil {
		_ = unix.Close(fds[0])
		_ = unix.Close(fds[1])
		return nil, nil, fmt.Errorf("set up a pipe: %w", err)
	}
	return os.NewFile(uintptr(fds[0]), "stdio-read"), os.NewFile(uintptr(fds[1]), "stdio-write"), nil
}

// childStarted closes the process's ends and receives the terminal, after libcontainer has started the process.
func (io *processIO) childStarted() error {
	io.mu.Lock()
	defer io.mu.Unlock()
	for _, f := range io.child {
		_ = f.Close()
	}
	io.child = nil
	if io.console == nil {
		return nil
	}
	// The process has sent it before it reported that it is ready, so this does not wait.
	master, err := receiveMaster(io.console)
	_ = io.console.Close()
	io.console = nil
	if err != nil {
		return fmt.Errorf("receive the terminal: %w", err)
	}
	io.master = master
	return io.resizeLocked()
}

// receiveMaster takes the one descriptor that is sent over a socket.
func receiveMaster(socket *os.File) (*os.File, error) {
	var (
		name [4096]byte
		oob  [64]byte
		oobn int
		err  error
	)
	for {
		_, oobn, _, _, err = unix.Recvmsg(int(socket.Fd()), name[:], oob[:], unix.MSG_CMSG_CLOEXEC)
		if err != unix.EINTR {
			break
		}
	}
	if err != nil {
		return nil, os.NewSyscallError("recvmsg", err)
	}
	messages, err := unix.ParseSocketControlMessage(oob[:oobn])
	if err != nil {
		return nil, err
	}
	var fds []int
	for i := range messages {
		got, err := unix.ParseUnixRights(&messages[i])
		if err != nil {
			continue
		}
		fds = append(fds, got...)
	}
	if len(fds) != 1 {
		for _, fd := range fds {
			_ = unix.Close(fd)
		}
		return nil, fmt.Errorf("got %d descriptors, want 1", len(fds))
	}
	if err := unix.SetNonblock(fds[0], true); err != nil {
		_ = unix.Close(fds[0])
		return nil, err
	}
	return os.NewFile(uintptr(fds[0]), "terminal"), nil
}

// resize sets the window size. Before the terminal exists it is kept.
func (io *processIO) resize(width, height uint16) error {
	io.mu.Lock()
	defer io.mu.Unlock()
	io.width, io.height = width, height
	return io.resizeLocked()
}

func (io *processIO) resizeLocked() error {
	if io.master == nil || io.width == 0 || io.height == 0 {
		return nil
	}
	raw, err := io.master.SyscallConn()
	if err != nil {
		return err
	}
	var sysErr error
	if err := raw.Control(func(fd uintptr) {
		sysErr = unix.IoctlSetWinsize(int(fd), unix.TIOCSWINSZ, &unix.Winsize{Col: io.width, Row: io.height})
	}); err != nil {
		return err
	}
	return os.NewSyscallError("ioctl TIOCSWINSZ", sysErr)
}

// attach starts copying. The connections are in the order of spec.ids.
func (io *processIO) attach(conns []net.Conn) {
	io.mu.Lock()
	defer io.mu.Unlock()
	if io.closed {
		for _, c := range conns {
			_ = c.Close()
		}
		return
	}
	io.conns = conns
	next := func(want bool) net.Conn {
		if !want {
			return nil
		}
		c := conns[0]
		conns = conns[1:]
		return c
	}
	stdin, stdout, stderr := next(io.spec.stdin != nil), next(io.spec.stdout != nil), next(io.spec.stderr != nil)
	if io.master != nil {
		// A terminal is read even if nobody wants it: its buffer is small, and a full one stops the process.
		io.out = startOutput(io.master, stdout)
		if stdin != nil {
			io.in = startInput(stdin, io.master, true)
		}
		return
	}
	if io.stdin != nil {
		io.in = startInput(stdin, io.stdin, false)
	}
	if io.stdout != nil {
		io.out = startOutput(io.stdout, stdout)
	}
	if io.stderr != nil {
		io.err = startOutput(io.stderr, stderr)
	}
}

// exited is called once, when the process is gone. It returns when what the process wrote has been read, or the host
// takes no more, with the number of bytes read from stdout and stderr.
func (io *processIO) exited() (stdout, stderr uint64) {
	io.mu.Lock()
	in, out, err := io.in, io.out, io.err
	io.mu.Unlock()
	if in != nil {
		in.stop()
	}
	for _, o := range []*output{out, err} {
		if o != nil {
			o.exited()
		}
	}
	var both sync.WaitGroup
	count := func(o *output, n *uint64) {
		if o != nil {
			both.Go(func() {
				o.waitDrained(io.stall)
				*n = o.read.Load()
			})
		}
	}
	count(out, &stdout)
	count(err, &stderr)
	both.Wait()
	return stdout, stderr
}

// close ends all copying and closes every descriptor and connection.
func (io *processIO) close() {
	io.mu.Lock()
	io.closeLocked()
	in, out, err := io.in, io.out, io.err
	io.mu.Unlock()
	if in != nil {
		<-in.finished
	}
	for _, o := range []*output{out, err} {
		if o != nil {
			<-o.finished
		}
	}
}

func (io *processIO) closeLocked() {
	io.closed = true
	for _, f := range append(io.child, io.stdin, io.stdout, io.stderr, io.console, io.master) {
		if f != nil {
			_ = f.Close()
		}
	}
	io.child, io.console, io.master = nil, nil, nil
	io.stdin, io.stdout, io.stderr = nil, nil, nil
	for _, c := range io.conns {
		_ = c.Close()
	}
}
