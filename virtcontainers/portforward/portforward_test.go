// SPDX-License-Identifier: Apache-2.0

package portforward

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/cloister-project/cloister/hypervisor/vsock"
	"github.com/cloister-project/cloister/virtcontainers/network"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func newNs(t *testing.T) *network.Namespace {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("makes network namespaces: needs root")
	}
	ns, err := network.NewNetns()
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, ns.Close()) })
	return ns
}

// listen starts a Forwarder; what it dials is a listener of the test's that answers with the port and what it read.
func listen(t *testing.T, ns *network.Namespace, dial Dial) {
	t.Helper()
	f, err := Listen(t.Context(), ns.File())
	if errors.Is(err, ebpf.ErrNotSupported) {
		t.Skipf("this machine's kernel: %v", err)
	}
	require.NoError(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		f.Serve(ctx, dial)
	}()
	t.Cleanup(func() {
		cancel()
		<-done
		require.NoError(t, dialIn(ns, "127.0.0.1:1", func(net.Conn) error { return nil }, unix.ECONNREFUSED))
	})
}

// dialIn connects from within the namespace; want is the error that connecting must give.
func dialIn(ns *network.Namespace, address string, use func(net.Conn) error, want error) error {
	return network.Inside(ns.File(), func() error {
		conn, err := net.DialTimeout("tcp", address, 10*time.Second)
		if want != nil {
			if !errors.Is(err, want) {
				return fmt.Errorf("connected to %s, or with another error: %w", address, err)
			}
			return nil
		}
		if err != nil {
			return err
		}
		defer conn.Close()
		if err := conn.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
			return err
		}
		return use(conn)
	})
}

// guest answers what it is sent, then the port, and ends.
func guest(t *testing.T) Dial {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	t.Cleanup(func() { _ = l.Close() })
	return func(ctx context.Context, port uint16, ipv6 bool) (vsock.Conn, error) {
		if port == 81 {
			return nil, errors.New("nothing listens there")
		}
		near, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			return nil, err
		}
		far, err := l.Accept()
		if err != nil {
			return nil, err
		}
		go func() {
			defer far.Close()
			_, _ = io.Copy(far, far)
			_, _ = fmt.Fprintf(far, " %d %t", port, ipv6)
		}()
		return near.(*net.TCPConn), nil
	}
}

func TestForward(t *testing.T) {
	ns := newNs(t)
	listen(t, ns, guest(t))
	for address, want := range map[string]string{
		"127.0.0.1:8080": "hello 8080 false", "127.1.2.3:1": "hello 1 false", "[::1]:65535": "hello 65535 true",
	} {
		err := dialIn(ns, address, func(conn net.Conn) error {
			if _, err := io.WriteString(conn, "hello"); err != nil {
				return err
			}
			if err := conn.(*net.TCPConn).CloseWrite(); err != nil {
				return err
			}
			got, err := io.ReadAll(conn) // the other way goes on
			require.Equal(t, want, string(got))
			return err
		}, nil)
		require.NoError(t, err, address)
	}
	// A port where nothing listens in the guest.
	err := dialIn(ns, "127.0.0.1:81", func(conn net.Conn) error {
		_, err := conn.Read(make([]byte, 1))
		return err
	}, nil)
	require.ErrorIs(t, err, unix.ECONNRESET, "while it connects, or behind that")
}

// Connections end with the Forwarder, also those of clients that do nothing.
func TestServeEnds(t *testing.T) {
	ns := newNs(t)
	f, err := Listen(t.Context(), ns.File())
	if errors.Is(err, ebpf.ErrNotSupported) {
		t.Skipf("this machine's kernel: %v", err)
	}
	require.NoError(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	dialed := make(chan struct{})
	dial := guest(t)
	go func() {
		defer close(done)
		f.Serve(ctx, func(ctx context.Context, port uint16, ipv6 bool) (vsock.Conn, error) {
			defer close(dialed)
			return dial(ctx, port, ipv6)
		})
	}()
	require.NoError(t, dialIn(ns, "127.0.0.1:80", func(conn net.Conn) error {
		<-dialed
		cancel()
		<-done
		_, err := conn.Read(make([]byte, 1))
		require.ErrorIs(t, err, unix.ECONNRESET)
		return nil
	}, nil))
	require.NoError(t, f.Close())
}

// Closed before anybody has ended Serve, it does not go on accepting.
func TestCloseEndsServe(t *testing.T) {
	ns := newNs(t)
	f, err := Listen(t.Context(), ns.File())
	if errors.Is(err, ebpf.ErrNotSupported) {
		t.Skipf("this machine's kernel: %v", err)
	}
	require.NoError(t, err)
	require.NoError(t, f.Close())
	require.NoError(t, f.Close())
	f.Serve(t.Context(), nil)
}

func TestListenFails(t *testing.T) {
	ns := newNs(t)
	require.NoError(t, ns.Close())
	_, err := Listen(t.Context(), ns.File())
	require.ErrorContains(t, err, "listen on loopback of the pod's network namespace")
}
