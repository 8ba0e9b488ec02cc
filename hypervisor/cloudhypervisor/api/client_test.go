// SPDX-License-Identifier: Apache-2.0

package api

import (
	"bytes"
	"context"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/cloister-project/cloister/hypervisor"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// serve takes one connection and hands over what one recvmsg gives.
func serve(t *testing.T, answer func(c *net.UnixConn, request string, fds []int)) *Client {
	t.Helper()
	dir, err := os.MkdirTemp("", "api")
	require.NoError(t, err)
	socket := filepath.Join(dir, "s")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket, Net: "unix"})
	require.NoError(t, err)
	done := make(chan struct{})
	go func() {
		defer close(done)
		c, err := l.AcceptUnix()
		if err != nil {
			return
		}
		defer c.Close()
		data, oob := make([]byte, maxRequest), make([]byte, 256)
		n, oobn, _, _, err := c.ReadMsgUnix(data, oob)
		if err != nil {
			return
		}
		var fds []int
		messages, _ := unix.ParseSocketControlMessage(oob[:oobn])
		for _, m := range messages {
			rights, _ := unix.ParseUnixRights(&m)
			fds = append(fds, rights...)
		}
		answer(c, string(data[:n]), fds)
	}()
	t.Cleanup(func() {
		_ = l.Close()
		<-done
		_ = os.RemoveAll(dir)
	})
	return &Client{Socket: socket}
}

func TestDoSendsFilesWithTheWholeRequest(t *testing.T) {
	r, w, err := os.Pipe()
	require.NoError(t, err)
	defer r.Close()
	c := serve(t, func(c *net.UnixConn, request string, fds []int) {
		if len(fds) == 1 {
			f := os.NewFile(uintptr(fds[0]), "received")
			_, _ = io.WriteString(f, request)
			_ = f.Close()
		}
		_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
	})
	body, err := c.Do(t.Context(), hypervisor.Request{Method: "PUT", Path: "/api/v1/vm.add-net", Body: []byte(`{"id":"eth0"}`)}, w)
	require.NoError(t, err)
	require.Equal(t, "{}", string(body))
	require.NoError(t, w.Close(), "the file stays the caller's")
	got, err := io.ReadAll(r) // ends: no copy of the file is left open
	require.NoError(t, err)
	require.Equal(t, "PUT /api/v1/vm.add-net HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\nContent-Type: application/json\r\n"+
		"Content-Length: 13\r\n\r\n{\"id\":\"eth0\"}", string(got))
}

func TestDoFaults(t *testing.T) {
	for name, tc := range map[string]struct {
		reply string
		want  error
	}{
		"no content":   {"HTTP/1.1 204 No Content\r\n\r\n", nil},
		"bad request":  {"HTTP/1.1 400 x\r\nContent-Length: 3\r\n\r\nwhy", errdefs.ErrInvalidArgument},
		"not found":    {"HTTP/1.1 404 x\r\n\r\n", errdefs.ErrNotFound},
		"there twice":  {"HTTP/1.1 409 x\r\n\r\n", errdefs.ErrAlreadyExists},
		"server error": {"HTTP/1.1 500 x\r\n\r\n", errdefs.ErrInternal},
		"nothing":      {"", io.ErrUnexpectedEOF},
		"half a head":  {"HTTP/1.1 200 OK\r\nContent-Le", io.ErrUnexpectedEOF},
		"half a body":  {"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc", io.ErrUnexpectedEOF},
		"continue":     {"HTTP/1.1 100 Continue\r\n\r\n", errdefs.ErrInvalidArgument},
		"other words":  {"SSH-2.0-x\r\n", errdefs.ErrInvalidArgument},
		"no CR":        {"HTTP/1.1 200 OK\n\n", errdefs.ErrInvalidArgument},
		"chunked":      {"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", errdefs.ErrInvalidArgument},
		"two lengths":  {"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nContent-Length: 1\r\n\r\n", errdefs.ErrInvalidArgument},
		"long body":    {"HTTP/1.1 200 OK\r\nContent-Length: 1048577\r\n\r\n", errdefs.ErrInvalidArgument},
		"long line":    {"HTTP/1.1 200 " + strings.Repeat("x", maxHead), errdefs.ErrInvalidArgument},
		"many headers": {"HTTP/1.1 200 OK\r\n" + strings.Repeat("a: b\r\n", maxHead), errdefs.ErrInvalidArgument},
	} {
		t.Run(name, func(t *testing.T) {
			c := serve(t, func(c *net.UnixConn, _ string, _ []int) { _, _ = io.WriteString(c, tc.reply) })
			_, err := c.Do(t.Context(), hypervisor.Request{Method: "PUT", Path: "/api/v1/vm.boot"})
			require.ErrorIs(t, err, tc.want)
		})
	}
}

func TestDoEndsWithItsContext(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	c := serve(t, func(c *net.UnixConn, _ string, _ []int) {
		cancel()
		_, _ = io.Copy(io.Discard, c)
	})
	_, err := c.Do(ctx, hypervisor.Request{Method: "PUT", Path: "/api/v1/vm.boot"})
	require.ErrorIs(t, err, context.Canceled)
}

func TestDoWithoutVMM(t *testing.T) {
	_, err := (&Client{Socket: filepath.Join(t.TempDir(), "s")}).Do(t.Context(), hypervisor.Request{Method: "GET", Path: "/"})
	require.ErrorIs(t, err, errdefs.ErrUnavailable)
}

func TestErrorsAreStripped(t *testing.T) {
	err := statusError(500, []byte("a\x1b[31m\nb\xff"+strings.Repeat("c", 2*maxWords)))
	require.NotContains(t, err.Error(), "\x1b")
	require.NotContains(t, err.Error(), "\n")
	require.Less(t, len(err.Error()), 2*maxWords)
}

func FuzzReadReply(f *testing.F) {
	for _, seed := range []string{"", "HTTP/1.1 204 No Content\r\n\r\n", "HTTP/1.1 200 OK\r\nServer: x\r\nContent-Length: 2\r\n\r\n{}more"} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		status, body, err := readReply(bytes.NewReader(data))
		if err != nil && (status != 0 || body != nil) {
			t.Fatalf("a reply beside the error %v", err)
		}
		if err == nil && (status < 200 || status > 999 || len(body) > maxBody || !bytes.Contains(data, body)) {
			t.Fatalf("status %d, body %q", status, body)
		}
	})
}
