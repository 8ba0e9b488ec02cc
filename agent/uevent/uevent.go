// SPDX-License-Identifier: Apache-2.0

package uevent

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// Listener tells when the kernel adds or changes devices.
type Listener struct{ file *os.File }

// messageSize is more than the kernel puts into one message (UEVENT_BUFFER_SIZE, 2 KiB, and the head).
const messageSize = 8 << 10

// Listen begins to listen.
func Listen() (*Listener, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_KOBJECT_UEVENT)
	if err != nil {
		return nil, fmt.Errorf("open a socket for the kernel's device events: %w", err)
	}
	// Group 1 is the kernel's, 2 udev's.
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: 1}); err != nil {
		_ = unix.Close(fd)
		return nil, fmt.Errorf("listen to the kernel's device events: %w", err)
	}
	return &Listener{file: os.NewFile(uintptr(fd), "uevents")}, nil
}

// Close ends it.
func (u *Listener) Close() { _ = u.file.Close() }

// Await calls ready until it says yes: at once, and again after each event of the subsystem. Events that come in
// between are kept by the kernel, so that none is missed. Not for two goroutines at one time.
func (u *Listener) Await(ctx context.Context, subsystem string, ready func() (bool, error)) error {
	// A deadline in the past wakes the read; it is taken away again for the next Await.
	woken := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		_ = u.file.SetReadDeadline(time.Unix(1, 0))
		close(woken)
	})
	defer func() {
		if !stop() {
			<-woken
			_ = u.file.SetReadDeadline(time.Time{})
		}
	}()
	conn, err := u.file.SyscallConn()
	if err != nil {
		return err
	}
	buf := make([]byte, messageSize)
	for {
		ok, err := ready()
		if err != nil || ok {
			return err
		}
		for relevant := false; !relevant; {
			relevant, err = receive(conn, buf, subsystem)
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			if err != nil {
				return fmt.Errorf("read the kernel's device events: %w", err)
			}
		}
	}
}

// receive waits for a message and reports whether it may be of interest.
func receive(conn interface {
	Read(func(fd uintptr) bool) error
}, buf []byte, subsystem string) (relevant bool, err error) {
	readErr := conn.Read(func(fd uintptr) bool {
		var n int
		var from unix.Sockaddr
		n, from, err = unix.Recvfrom(int(fd), buf, 0)
		switch {
		case errors.Is(err, unix.EAGAIN):
			return false
		case errors.Is(err, unix.EINTR):
			err = nil
		case errors.Is(err, unix.ENOBUFS):
			// Messages were lost: look.
			err, relevant = nil, true
		case err == nil:
			kernel, ok := from.(*unix.SockaddrNetlink)
			relevant = ok && kernel.Pid == 0 && parse(buf[:n], subsystem)
		}
		return true
	})
	return relevant, errors.Join(readErr, err)
}

// parse reports whether a message tells of a new or changed device of the subsystem. The message is the kernel's:
// "ACTION@DEVPATH" and then KEY=value texts, each ended by NUL.
func parse(msg []byte, subsystem string) bool {
	head, rest, found := bytes.Cut(msg, []byte{0})
	if !found || bytes.HasPrefix(head, []byte("remove@")) {
		return false
	}
	for entry := range bytes.SplitSeq(rest, []byte{0}) {
		if value, ok := bytes.CutPrefix(entry, []byte("SUBSYSTEM=")); ok {
			return string(value) == subsystem
		}
	}
	return false
}
