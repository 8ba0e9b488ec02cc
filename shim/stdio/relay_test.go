// SPDX-License-Identifier: Apache-2.0

package stdio

import (
	"bytes"
	"context"
	"crypto/rand"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/cloister-project/cloister/hypervisor/vsock"
	"github.com/cloister-project/cloister/virtcontainers"
)

var _ virtcontainers.ProcessIO = (*Relay)(nil)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// stream is a guest's stream: what the relay gets, and the guest's own end.
func stream(t *testing.T) (relay vsock.Conn, guest *net.UnixConn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	require.NoError(t, err)
	var conns [2]*net.UnixConn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "stream")
		c, err := net.FileConn(f)
		require.NoError(t, err)
		require.NoError(t, f.Close())
		conns[i] = c.(*net.UnixConn)
	}
	t.Cleanup(func() {
		_ = conns[0].Close()
		_ = conns[1].Close()
	})
	return conns[0], conns[1]
}

func fifo(t *testing.T, name string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	require.NoError(t, syscall.Mkfifo(path, 0o600))
	return path
}

func open(t *testing.T, c Config) *Relay {
	t.Helper()
	r, err := Open(t.Context(), c)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, r.Close()) })
	require.NoError(t, r.OpenStdin())
	return r
}

// reader opens a FIFO as containerd does, for reading.
func reader(t *testing.T, path string) *os.File {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	require.NoError(t, err)
	t.Cleanup(func() { _ = f.Close() })
	return f
}

func writer(t *testing.T, path string) *os.File {
	t.Helper()
	f, err := os.OpenFile(path, os.O_WRONLY|unix.O_NONBLOCK, 0)
	require.NoError(t, err)
	return f
}

func soon(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func TestBurstArrivesWholeAndDrainWaitsForIt(t *testing.T) {
	path := fifo(t, "stdout")
	r := open(t, Config{Stdout: path})
	conn, guest := stream(t)
	r.Attach(nil, conn, nil)

	data := make([]byte, 8<<20)
	_, _ = rand.Read(data)
	go func() {
		_, _ = guest.Write(data)
		_ = guest.CloseWrite()
	}()
	drained := make(chan struct{})
	go func() {
		r.Drain(soon(t), uint64(len(data)), 0)
		close(drained)
	}()
	// Nobody reads yet: the drain has to wait.
	select {
	case <-drained:
		t.Fatal("drained before anything was read")
	case <-time.After(20 * time.Millisecond):
	}
	got, err := io.ReadAll(reader(t, path))
	require.NoError(t, err, "the FIFO ends with the stream")
	require.True(t, bytes.Equal(data, got))
	<-drained
}

func TestDrainByCountWithABackgroundChild(t *testing.T) {
	path := fifo(t, "stdout")
	r := open(t, Config{Stdout: path})
	in := reader(t, path)
	conn, guest := stream(t)
	r.Attach(nil, conn, nil)
	_, err := guest.Write([]byte("hello"))
	require.NoError(t, err)
	// The guest's stream stays open: a child of the process holds it.
	r.Drain(soon(t), 5, 0)
	buf := make([]byte, 16)
	n, err := in.Read(buf)
	require.NoError(t, err)
	require.Equal(t, "hello", string(buf[:n]))

	// More than there will be, until ctx ends.
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	r.Drain(ctx, 6, 0)
	require.Error(t, ctx.Err())

	// Close ends every drain.
	done := make(chan struct{})
	go func() {
		r.Drain(soon(t), 7, 0)
		close(done)
	}()
	require.NoError(t, r.Close())
	<-done
}

func TestReaderThatGoesAwayLosesNothing(t *testing.T) {
	path := fifo(t, "stdout")
	r := open(t, Config{Stdout: path})
	conn, guest := stream(t)
	r.Attach(nil, conn, nil)

	first := reader(t, path)
	_, err := guest.Write([]byte("one"))
	require.NoError(t, err)
	r.Drain(soon(t), 3, 0)
	buf := make([]byte, 3)
	_, err = io.ReadFull(first, buf)
	require.NoError(t, err)
	require.NoError(t, first.Close())

	// containerd is away.
	_, err = guest.Write([]byte("two"))
	require.NoError(t, err)
	r.Drain(soon(t), 6, 0)
	second := reader(t, path)
	_, err = guest.Write([]byte("three"))
	require.NoError(t, err)
	require.NoError(t, guest.CloseWrite())
	got, err := io.ReadAll(second)
	require.NoError(t, err)
	require.Equal(t, "twothree", string(got))
}

func TestCloseNeverBlocks(t *testing.T) {
	path, inPath := fifo(t, "stdout"), fifo(t, "stdin")
	r := open(t, Config{Stdout: path, Stderr: path, Stdin: inPath})
	stdin, stdinGuest := stream(t)
	stdout, guest := stream(t)
	stderr, _ := stream(t)
	r.Attach(stdin, stdout, stderr)

	// The FIFO is full and nobody reads; the guest's stdin is full and nobody reads.
	go func() { _, _ = guest.Write(make([]byte, 4<<20)) }()
	w := writer(t, inPath)
	go func() {
		_, _ = w.Write(make([]byte, 4<<20))
		_ = w.Close()
	}()
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	r.Drain(ctx, 4<<20, 0)
	require.Error(t, ctx.Err())
	closed := make(chan struct{})
	go func() {
		_ = r.Close()
		_ = r.Close()
		close(closed)
	}()
	select {
	case <-closed:
	case <-time.After(10 * time.Second):
		t.Fatal("Close blocks")
	}
	_ = stdinGuest.Close()
}

func TestStdinDetachReattachAndClose(t *testing.T) {
	path := fifo(t, "stdin")
	r := open(t, Config{Stdin: path})
	conn, guest := stream(t)
	r.Attach(conn, nil, nil)

	buf := make([]byte, 64)
	for _, text := range []string{"one", "two", "three"} {
		w := writer(t, path)
		_, err := w.WriteString(text)
		require.NoError(t, err)
		require.NoError(t, w.Close(), "a detach, not the end")
		n, err := guest.Read(buf)
		require.NoError(t, err)
		require.Equal(t, text, string(buf[:n]))
	}
	require.NoError(t, guest.SetReadDeadline(time.Now().Add(20*time.Millisecond)))
	_, err := guest.Read(buf)
	require.ErrorIs(t, err, os.ErrDeadlineExceeded, "no end of input yet")
	require.NoError(t, guest.SetReadDeadline(time.Time{}))

	r.CloseStdin()
	r.CloseStdin()
	_, err = guest.Read(buf)
	require.ErrorIs(t, err, io.EOF)
	r.CloseStdin()
	require.NoError(t, r.Close())
	r.CloseStdin()
}

func TestCloseStdinDeliversWhatIsPending(t *testing.T) {
	path := fifo(t, "stdin")
	r := open(t, Config{Stdin: path})
	data := make([]byte, 60<<10) // fits into a FIFO
	_, _ = rand.Read(data)
	w := writer(t, path)
	defer w.Close() // a client that keeps its end open
	_, err := w.Write(data)
	require.NoError(t, err)
	// Before the process even starts.
	r.CloseStdin()

	conn, guest := stream(t)
	r.Attach(conn, nil, nil)
	got, err := io.ReadAll(guest)
	require.NoError(t, err)
	require.True(t, bytes.Equal(data, got))
}

// TestStdinIsOpenedAtTheStart does what ctr does with little input: it ends long before the process can start, and
// only once the FIFO has a reader does the client get to write it.
func TestStdinIsOpenedAtTheStart(t *testing.T) {
	path := fifo(t, "stdin")
	r, err := Open(t.Context(), Config{Stdin: path})
	require.NoError(t, err)
	defer r.Close()
	conn, guest := stream(t)
	r.Attach(conn, nil, nil)
	_, err = os.OpenFile(path, os.O_WRONLY|unix.O_NONBLOCK, 0)
	require.ErrorIs(t, err, unix.ENXIO, "nobody reads it yet")
	require.NoError(t, r.OpenStdin())
	w := writer(t, path)
	_, err = w.Write([]byte("little"))
	require.NoError(t, err)
	require.NoError(t, w.Close())
	r.CloseStdin()
	got, err := io.ReadAll(guest)
	require.NoError(t, err)
	require.Equal(t, "little", string(got))

	require.NoError(t, os.Remove(path))
	_, err = Open(t.Context(), Config{Stdin: path})
	require.ErrorIs(t, err, errdefs.ErrNotFound)
}

func TestStdinInBulk(t *testing.T) {
	path := fifo(t, "stdin")
	r := open(t, Config{Stdin: path})
	conn, guest := stream(t)
	r.Attach(conn, nil, nil)
	data := make([]byte, 20<<20)
	_, _ = rand.Read(data)
	go func() {
		w, err := os.OpenFile(path, os.O_WRONLY, 0)
		if err != nil {
			return
		}
		_, _ = w.Write(data)
		_ = w.Close()
		r.CloseStdin()
	}()
	got, err := io.ReadAll(guest)
	require.NoError(t, err)
	require.True(t, bytes.Equal(data, got))
}

func TestProcessThatClosedItsStdinEndsTheWriter(t *testing.T) {
	path := fifo(t, "stdin")
	r := open(t, Config{Stdin: path})
	conn, guest := stream(t)
	r.Attach(conn, nil, nil)
	w := writer(t, path)
	defer w.Close()
	require.NoError(t, guest.Close())
	require.Eventually(t, func() bool {
		_, err := w.Write([]byte("x"))
		return err != nil && strings.Contains(err.Error(), "broken pipe")
	}, 10*time.Second, time.Millisecond)
}

func TestFiles(t *testing.T) {
	dir := t.TempDir()
	log := filepath.Join(dir, "logs", "out.log")
	r := open(t, Config{Stdout: "file://" + log, Stderr: "file://" + log})
	stdout, out := stream(t)
	stderr, err2 := stream(t)
	r.Attach(nil, stdout, stderr)
	_, err := out.Write([]byte("out\n"))
	require.NoError(t, err)
	r.Drain(soon(t), 4, 0)
	require.NoError(t, out.Close())
	r.Drain(soon(t), 1<<30, 0) // all there will ever be
	_, err = err2.Write([]byte("err\n"))
	require.NoError(t, err)
	r.Drain(soon(t), 0, 4)
	got, err := os.ReadFile(log)
	require.NoError(t, err)
	require.Equal(t, "out\nerr\n", string(got))
}

func TestOutputThatCannotBeWrittenIsDropped(t *testing.T) {
	r := open(t, Config{Stdout: "/dev/full"})
	conn, guest := stream(t)
	r.Attach(nil, conn, nil)
	go func() { _, _ = guest.Write(make([]byte, 1<<20)) }()
	r.Drain(soon(t), 1<<20, 0)
}

func TestTerminalHasNoStderr(t *testing.T) {
	r := open(t, Config{Stdout: fifo(t, "o"), Stderr: "/does/not/exist", Terminal: true})
	require.Nil(t, r.err)
}

func TestOpenErrors(t *testing.T) {
	for name, tt := range map[string]struct {
		c    Config
		kind error
		text string
	}{
		"no such fifo":  {Config{Stdout: "/does/not/exist"}, errdefs.ErrNotFound, "stdout"},
		"streaming":     {Config{Stdin: "ttrpc+unix:///shim.sock?streaming_id=c-stdin"}, errdefs.ErrNotImplemented, "io_type"},
		"streaming out": {Config{Stdout: "ttrpc+unix:///shim.sock?streaming_id=c-stdout"}, errdefs.ErrNotImplemented, "io_type"},
		"scheme":        {Config{Stderr: "http://x/y"}, errdefs.ErrInvalidArgument, "scheme"},
		"relative":      {Config{Stdout: "file:out"}, errdefs.ErrInvalidArgument, "absolute"},
		"not a url":     {Config{Stdout: "a\x00b"}, errdefs.ErrInvalidArgument, "stdio"},
		"no logger":     {Config{Stdout: "binary:///does/not/exist"}, errdefs.ErrNotFound, "logging program"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := Open(t.Context(), tt.c)
			require.ErrorIs(t, err, tt.kind)
			require.ErrorContains(t, err, tt.text)
		})
	}
}

func TestNothingIsLeftOpen(t *testing.T) {
	fds := func() int {
		entries, err := os.ReadDir("/proc/self/fd")
		require.NoError(t, err)
		return len(entries)
	}
	stdin, stdout := fifo(t, "stdin"), fifo(t, "stdout")
	before := fds()
	for range 10 {
		r, err := Open(t.Context(), Config{Stdin: stdin, Stdout: stdout, Stderr: stdout})
		require.NoError(t, err)
		require.NoError(t, r.OpenStdin())
		a, ag := stream(t)
		b, bg := stream(t)
		r.Attach(a, b, nil)
		require.NoError(t, r.Close())
		require.NoError(t, ag.Close())
		require.NoError(t, bg.Close())
		_, err = Open(t.Context(), Config{Stdin: stdin, Stdout: "/does/not/exist"})
		require.Error(t, err)
	}
	require.LessOrEqual(t, fds(), before)
}

func TestAttachAfterCloseClosesTheStreams(t *testing.T) {
	r := open(t, Config{Stdout: fifo(t, "o")})
	require.NoError(t, r.Close())
	conn, guest := stream(t)
	r.Attach(nil, conn, nil)
	_, err := guest.Read(make([]byte, 1))
	require.ErrorIs(t, err, io.EOF)
}
