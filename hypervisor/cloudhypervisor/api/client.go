// SPDX-License-Identifier: Apache-2.0

package api

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"time"
	"unicode"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/cloister-project/cloister/hypervisor"
)

const (
	// maxRequest is what Cloud Hypervisor's HTTP server takes of a body (micro_http, HTTP_MAX_PAYLOAD_SIZE), in bytes; it fits
	// a unix socket's send buffer, so that one sendmsg takes all of a request.
	maxRequest = 51200
	// maxWords is how much of an error's text is quoted, in bytes.
	maxWords = 1 << 10
)

// Client calls one VMM. The zero value is not usable.
type Client struct {
	// Socket is the path of the API socket.
	Socket string
}

// Do sends a request with the files that belong to it and returns the reply's body; the files stay the caller's. ctx bounds
// all of it. A status of 300 or more is a *StatusError with the VMM's own words: errdefs.ErrNotFound (404), ErrAlreadyExists
// (409), ErrInvalidArgument (400), else ErrInternal. errdefs.ErrUnavailable: there is no VMM behind the socket.
func (c *Client) Do(ctx context.Context, r hypervisor.Request, files ...*os.File) ([]byte, error) {
	body, err := c.do(ctx, r, files)
	if err != nil {
		if ctx.Err() != nil {
			err = ctx.Err()
		}
		return nil, fmt.Errorf("%s %s: %w", r.Method, r.Path, err)
	}
	return body, nil
}

func (c *Client) do(ctx context.Context, r hypervisor.Request, files []*os.File) (_ []byte, err error) {
	request := marshal(r)
	if len(request) > maxRequest {
		return nil, fmt.Errorf("the request has %d bytes, %d are possible: %w", len(request), maxRequest, errdefs.ErrInvalidArgument)
	}
	nc, err := (&net.Dialer{}).DialContext(ctx, "unix", c.Socket)
	if err != nil {
		return nil, fmt.Errorf("no VMM takes requests there (%w): %w", err, errdefs.ErrUnavailable)
	}
	conn := nc.(*net.UnixConn)
	expired := make(chan struct{})
	release := context.AfterFunc(ctx, func() {
		defer close(expired)
		_ = conn.SetDeadline(time.Unix(1, 0))
	})
	defer func() {
		if !release() {
			<-expired
		}
		err = errors.Join(err, conn.Close())
	}()
	if err := send(conn, request, files); err != nil {
		return nil, err
	}
	status, body, err := readReply(conn)
	if err != nil {
		return nil, err
	}
	return body, statusError(status, body)
}

func marshal(r hypervisor.Request) []byte {
	var b bytes.Buffer
	fmt.Fprintf(&b, "%s %s HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n", r.Method, r.Path)
	if r.Body != nil {
		fmt.Fprintf(&b, "Content-Type: application/json\r\nContent-Length: %d\r\n", len(r.Body))
	}
	b.WriteString("\r\n")
	b.Write(r.Body)
	return b.Bytes()
}

// send writes a request and its files with one sendmsg(2).
func send(conn *net.UnixConn, request []byte, files []*os.File) error {
	if len(files) == 0 {
		_, err := conn.Write(request)
		return err
	}
	fds := make([]int, 0, len(files))
	raws := make([]*os.File, 0, len(files))
	defer func() {
		for _, f := range raws {
			_ = f.Close()
		}
	}()
	for _, f := range files {
		// A copy, which nobody closes meanwhile; and Fd would make the caller's file a blocking one.
		fd, err := duplicate(f)
		if err != nil {
			return fmt.Errorf("file for the VMM: %w", err)
		}
		raws = append(raws, os.NewFile(uintptr(fd), f.Name()))
		fds = append(fds, fd)
	}
	n, _, err := conn.WriteMsgUnix(request, unix.UnixRights(fds...), nil)
	if err == nil && n < len(request) {
		err = io.ErrShortWrite
	}
	return err
}

func duplicate(f *os.File) (fd int, err error) {
	raw, err := f.SyscallConn()
	if err != nil {
		return -1, err
	}
	var dup error
	err = raw.Control(func(old uintptr) { fd, dup = unix.FcntlInt(old, unix.F_DUPFD_CLOEXEC, 0) })
	return fd, errors.Join(err, dup)
}

// StatusError is the VMM's refusal of a request. Without one in its chain, an error of Do leaves open whether the VMM did
// what it was asked.
type StatusError struct {
	Status int
	// Words are the VMM's own, bounded and on one line.
	Words string
}

// Error implements error.
func (e *StatusError) Error() string {
	return fmt.Sprintf("the VMM answers with status %d: %s", e.Status, e.Words)
}

// Unwrap returns the errdefs kind of the status.
func (e *StatusError) Unwrap() error {
	switch e.Status {
	case 400:
		return errdefs.ErrInvalidArgument
	case 404:
		return errdefs.ErrNotFound
	case 409:
		return errdefs.ErrAlreadyExists
	}
	return errdefs.ErrInternal
}

func statusError(status int, body []byte) error {
	if status < 300 {
		return nil
	}
	return &StatusError{Status: status, Words: clean(words(body))}
}

// words takes the messages out of an error's body: a JSON list from the outermost to the cause, or just text.
func words(body []byte) string {
	var list []string
	if json.Unmarshal(body, &list) == nil {
		return strings.Join(list, ": ")
	}
	return string(body)
}

func clean(s string) string {
	if len(s) > maxWords {
		s = s[:maxWords]
	}
	s = strings.Map(func(r rune) rune {
		if unicode.IsControl(r) || r == unicode.ReplacementChar {
			return ' '
		}
		return r
	}, s)
	return strings.Join(strings.Fields(s), " ")
}
