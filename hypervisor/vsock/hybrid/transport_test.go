// SPDX-License-Identifier: Apache-2.0

package hybrid

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"go.uber.org/goleak"

	"github.com/cloister-project/cloister/hypervisor/vsock"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func newTransport(t *testing.T) *Transport {
	t.Helper()
	dir, err := os.MkdirTemp("", "hybrid")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	tr, err := New(filepath.Join(dir, "v"), 3)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := tr.Close(); err != nil {
			t.Error(err)
		}
	})
	return tr
}

// peer serves one connection to the device's socket, as a VMM would: it reads the request and hands over to serve.
func peer(t *testing.T, tr *Transport, serve func(request string, c *net.UnixConn)) {
	t.Helper()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: tr.socket, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		c, err := l.AcceptUnix()
		if err != nil {
			return
		}
		defer c.Close()
		request, err := bufio.NewReader(c).ReadString('\n')
		if err == nil {
			serve(request, c)
		}
	}()
	t.Cleanup(func() { _ = l.Close(); _ = tr.Close(); <-done })
}

func TestDialCarriesBothDirectionsAndTheirEnds(t *testing.T) {
	tr := newTransport(t)
	peer(t, tr, func(request string, c *net.UnixConn) {
		if request != "CONNECT 1024\n" {
			t.Errorf("request %q", request)
		}
		// The stream's first bytes come with the answer.
		_, _ = io.WriteString(c, "OK 7\nhello ")
		sent, _ := io.ReadAll(c) // ends with CloseWrite
		_, _ = c.Write(sent)
	})
	c, err := tr.Dial(t.Context(), 1024)
	if err != nil {
		t.Fatal(err)
	}
	if got := c.RemoteAddr(); got != (vsock.Addr{CID: 3, Port: 1024}) {
		t.Errorf("remote address %v", got)
	}
	if _, err := io.WriteString(c, "guest"); err != nil {
		t.Fatal(err)
	}
	if err := c.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(c); err != nil || string(got) != "hello guest" {
		t.Errorf("read %q, %v", got, err)
	}
	if err := errors.Join(c.Close(), c.Close()); err != nil {
		t.Error(err)
	}
	if len(tr.conns) != 0 {
		t.Errorf("%d connections are kept after Close", len(tr.conns))
	}
}

func TestDialHostilePeer(t *testing.T) {
	for name, tc := range map[string]struct {
		answer string
		want   error
	}{
		"no answer":   {"", vsock.ErrRefused},
		"half":        {"OK 1", io.ErrUnexpectedEOF},
		"other words": {"NO 1\n", errdefs.ErrInvalidArgument},
		"empty line":  {"\n", errdefs.ErrInvalidArgument},
		"no space":    {"OK\n", errdefs.ErrInvalidArgument},
		"no end":      {"OK " + strings.Repeat("1", 1<<16), errdefs.ErrInvalidArgument},
		"zeros":       {strings.Repeat("\x00", 1<<16), errdefs.ErrInvalidArgument},
	} {
		t.Run(name, func(t *testing.T) {
			tr := newTransport(t)
			peer(t, tr, func(_ string, c *net.UnixConn) { _, _ = io.WriteString(c, tc.answer) })
			c, err := tr.Dial(t.Context(), 1)
			if !errors.Is(err, tc.want) || c != nil {
				t.Errorf("connection %v, error %v, want %v", c, err, tc.want)
			}
			if len(tr.conns) != 0 {
				t.Errorf("%d connections are left", len(tr.conns))
			}
		})
	}
}

func TestDialWaitsUntilItsContextOrTheTransportEnds(t *testing.T) {
	for name, want := range map[string]error{"context": context.Canceled, "transport": net.ErrClosed} {
		t.Run(name, func(t *testing.T) {
			tr := newTransport(t)
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			end := map[string]func(){"context": cancel, "transport": func() { _ = tr.Close() }}[name]
			peer(t, tr, func(_ string, c *net.UnixConn) {
				end() // the request is there, no answer comes
				_, _ = io.Copy(io.Discard, c)
			})
			if _, err := tr.Dial(ctx, 1); !errors.Is(err, want) {
				t.Errorf("error %v, want %v", err, want)
			}
		})
	}
}

func TestDialWithoutVMM(t *testing.T) {
	if _, err := newTransport(t).Dial(t.Context(), 1); !errdefs.IsUnavailable(err) || errors.Is(err, vsock.ErrRefused) {
		t.Errorf("error %v, want unavailable", err)
	}
}

func TestListen(t *testing.T) {
	tr := newTransport(t)
	l, err := tr.Listen(1025)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := tr.Listen(1025); !errdefs.IsAlreadyExists(err) {
		t.Errorf("second listener: %v", err)
	}
	guest, err := net.Dial("unix", tr.socket+"_1025")
	if err != nil {
		t.Fatal(err)
	}
	defer guest.Close()
	c, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	if c.LocalAddr() != (vsock.Addr{CID: vsock.HostCID, Port: 1025}) || c.LocalAddr() != l.Addr() {
		t.Errorf("local address %v", c.LocalAddr())
	}
	if _, ok := c.(vsock.Conn); !ok {
		t.Errorf("%T is no vsock.Conn", c)
	}
	if err := tr.Close(); err != nil {
		t.Error(err)
	}
	if _, err := l.Accept(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Accept after Close: %v", err)
	}
	if n, err := guest.Read(make([]byte, 1)); n != 0 || err == nil {
		t.Errorf("the guest's connection goes on: %d, %v", n, err)
	}
	if _, err := os.Stat(tr.socket + "_1025"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the listener's socket is left: %v", err)
	}
	if _, err := tr.Listen(1026); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Listen after Close: %v", err)
	}
}

func TestListenAgainAfterClose(t *testing.T) {
	tr := newTransport(t)
	for range 2 {
		l, err := tr.Listen(9)
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(l.Close(), l.Close()); err != nil {
			t.Fatal(err)
		}
	}
}

func TestConnectionsAreBounded(t *testing.T) {
	tr := newTransport(t)
	for range maxConns {
		if err := tr.keep(tr.newConn(nil, vsock.Addr{}, vsock.Addr{})); err != nil {
			t.Fatal(err)
		}
	}
	if err := tr.keep(tr.newConn(nil, vsock.Addr{}, vsock.Addr{})); !errdefs.IsResourceExhausted(err) {
		t.Errorf("one more: %v", err)
	}
	clear(tr.conns)
}

func TestNewRefuses(t *testing.T) {
	for name, tc := range map[string]struct {
		socket string
		cid    uint32
	}{
		"no path":      {"", 3},
		"long path":    {"/" + strings.Repeat("a", 96), 3},
		"reserved cid": {"/v", 2},
		"any cid":      {"/v", 1<<32 - 1},
	} {
		if _, err := New(tc.socket, tc.cid); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
	tr, err := New("/"+strings.Repeat("a", 95), 3)
	if err != nil {
		t.Fatal(err)
	}
	_ = tr.Close()
}

func FuzzReadAnswer(f *testing.F) {
	for _, seed := range []string{"", "OK 1\n", "OK 1073741824\nstream", "OK", "OK \n", "NO\n", "\n", strings.Repeat("OK ", 20)} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		r := bytes.NewReader(data)
		err := readAnswer(r)
		read := data[:len(data)-r.Len()]
		if len(read) > maxAnswer {
			t.Fatalf("%d bytes were read", len(read))
		}
		good := bytes.HasPrefix(read, []byte(answerPrefix)) && bytes.IndexByte(read, '\n') == len(read)-1
		if (err == nil) != good {
			t.Fatalf("%q: %v", read, err)
		}
	})
}
