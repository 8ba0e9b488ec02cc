// SPDX-License-Identifier: Apache-2.0

package stdio

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"
)

const (
	// loggerStart bounds how long a logging program may take until it says that it is ready.
	loggerStart = 10 * time.Second
	// loggerEnd is the time that it has for its last lines after its input ended, as in containerd's own shim; then it
	// gets SIGTERM, and after loggerTerm SIGKILL.
	loggerEnd  = 10 * time.Second
	loggerTerm = 2 * time.Second
)

// logger is a logging program: stdout and stderr of the container are its fds 3 and 4, and fd 5 is where it says that
// it is ready (containerd/core/runtime/v2/logging). binary:// says so by closing it, binary-v2:// by a byte.
type logger struct {
	raw      string
	cmd      *exec.Cmd
	out, err *sink
	usedOut  bool
	usedErr  bool
	ended    chan struct{}
	once     sync.Once
}

func startLogger(ctx context.Context, t target, namespace, id string) (_ *logger, err error) {
	var opened []*os.File
	defer func() {
		if err != nil {
			for _, f := range opened {
				_ = f.Close()
			}
		}
	}()
	pipe := func() (r, w *os.File, err error) {
		r, w, err = newPipe()
		if err == nil {
			opened = append(opened, r, w)
		}
		return r, w, err
	}
	outR, outW, err := pipe()
	if err != nil {
		return nil, err
	}
	errR, errW, err := pipe()
	if err != nil {
		return nil, err
	}
	ready, readyW, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	opened = append(opened, ready, readyW)

	cmd := exec.Command(t.path, t.args...)
	// Nothing of the shim's own environment goes along.
	cmd.Env = []string{"CONTAINER_ID=" + id, "CONTAINER_NAMESPACE=" + namespace}
	cmd.ExtraFiles = []*os.File{outR, errR, readyW}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start the logging program %s: %w", t.path, kind(err))
	}
	l := &logger{raw: t.raw, cmd: cmd, out: newSink(outW), err: newSink(errW), ended: make(chan struct{})}
	go func() {
		_ = cmd.Wait()
		close(l.ended)
	}()
	for _, f := range []*os.File{outR, errR, readyW} {
		_ = f.Close()
	}
	err = awaitReady(ctx, ready, t.scheme == "binary-v2")
	_ = ready.Close()
	if err != nil {
		_ = cmd.Process.Kill()
		<-l.ended
		return nil, fmt.Errorf("logging program %s: %w", t.path, err)
	}
	return l, nil
}

// newPipe makes a pipe whose read end is for another program, blocking, and whose write end is for us, not blocking.
func newPipe() (r, w *os.File, err error) {
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC); err != nil {
		return nil, nil, os.NewSyscallError("pipe2", err)
	}
	if err := unix.SetNonblock(fds[1], true); err != nil {
		_ = unix.Close(fds[0])
		_ = unix.Close(fds[1])
		return nil, nil, os.NewSyscallError("fcntl", err)
	}
	return os.NewFile(uintptr(fds[0]), "logger-r"), os.NewFile(uintptr(fds[1]), "logger"), nil
}

func awaitReady(ctx context.Context, ready *os.File, wantByte bool) error {
	ctx, cancel := context.WithTimeout(ctx, loggerStart)
	defer cancel()
	stop := context.AfterFunc(ctx, func() { _ = ready.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	var b [1]byte
	n, err := ready.Read(b[:])
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		return fmt.Errorf("it was not ready in time: %w", ctx.Err())
	case err != nil && !errors.Is(err, io.EOF):
		return err
	case wantByte && n == 0:
		return fmt.Errorf("it ended, or closed CONTAINER_WAIT, before it said that it is ready: %w", errdefs.ErrUnavailable)
	}
	return nil
}

// sink of one of the two streams.
func (l *logger) sink(stderr bool) *sink {
	if stderr {
		l.usedErr = true
		return l.err
	}
	l.usedOut = true
	return l.out
}

// closeUnused closes what no stream writes to, so that the program sees the end of it.
func (l *logger) closeUnused() {
	if !l.usedOut {
		l.usedOut = true
		l.out.release()
	}
	if !l.usedErr {
		l.usedErr = true
		l.err.release()
	}
}

// close lets the program end, in the background; its streams' outputs have been closed before.
func (l *logger) close() {
	l.once.Do(func() {
		l.closeUnused()
		go l.awaitEnd()
	})
}

func (l *logger) awaitEnd() {
	for _, step := range []struct {
		after  time.Duration
		signal syscall.Signal
	}{{loggerEnd, syscall.SIGTERM}, {loggerTerm, syscall.SIGKILL}} {
		timer := time.NewTimer(step.after)
		select {
		case <-l.ended:
			timer.Stop()
			return
		case <-timer.C:
			log.L.WithField("program", l.cmd.Path).Warnf("the logging program does not end, sending %s", step.signal)
			_ = l.cmd.Process.Signal(step.signal)
		}
	}
	<-l.ended
}
