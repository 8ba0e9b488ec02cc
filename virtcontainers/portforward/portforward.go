// SPDX-License-Identifier: Apache-2.0

package portforward

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"time"

	"github.com/containerd/log"

	"github.com/cloister-project/cloister/hypervisor/vsock"
	"github.com/cloister-project/cloister/virtcontainers/network"
)

const (
	// maxConnections bounds the connections that there are at a time; further ones are reset.
	maxConnections = 128
	// acceptPause keeps a failing accept (no descriptors left) from spinning.
	acceptPause = 100 * time.Millisecond
)

// Dial connects with a port of the guest's loopback (guest.Client.ForwardPort).
type Dial func(ctx context.Context, port uint16, ipv6 bool) (vsock.Conn, error)

// Forwarder is what listens in a network namespace.
type Forwarder struct {
	listeners [2]*net.TCPListener // by key of the map
	attached  io.Closer
	closed    sync.Once
}

// Listen makes a Forwarder for the namespace, which stays the caller's. It needs Linux 5.9 with BPF and the privilege for it.
func Listen(ctx context.Context, ns *os.File) (_ *Forwarder, err error) {
	f := &Forwarder{}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("listen on loopback of the pod's network namespace: %w", err), f.Close())
		}
	}()
	config := net.ListenConfig{}
	config.SetMultipathTCP(false) // no map takes these
	err = network.Inside(ns, func() error {
		for key, address := range []string{keyIPv4: "127.0.0.1:0", keyIPv6: "[::1]:0"} {
			l, err := config.Listen(ctx, "tcp", address)
			if err != nil {
				return err
			}
			f.listeners[key] = l.(*net.TCPListener)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	if f.attached, err = steer(ns, f.listeners); err != nil {
		return nil, err
	}
	return f, nil
}

// Close ends the listening. Connections that Serve has taken go on. It may be repeated.
func (f *Forwarder) Close() error {
	var err error
	f.closed.Do(func() { err = f.close() })
	return err
}

func (f *Forwarder) close() error {
	var errs []error
	if f.attached != nil {
		errs = append(errs, f.attached.Close())
	}
	for _, l := range f.listeners {
		if l != nil {
			errs = append(errs, l.Close())
		}
	}
	return errors.Join(errs...)
}

// Serve connects with the guest what comes in, until ctx ends or the Forwarder is closed. With ctx it closes the Forwarder and all
// connections before it returns.
func (f *Forwarder) Serve(ctx context.Context, dial Dial) {
	var wg sync.WaitGroup
	stop := context.AfterFunc(ctx, func() { _ = f.Close() })
	defer stop()
	turns := make(chan struct{}, maxConnections)
	for key, l := range f.listeners {
		wg.Go(func() {
			for ctx.Err() == nil {
				conn, err := l.AcceptTCP()
				if errors.Is(err, net.ErrClosed) {
					return
				}
				if err != nil {
					log.G(ctx).WithError(err).Warn("accept a connection to a port of the pod")
					pause(ctx, acceptPause)
					continue
				}
				select {
				case turns <- struct{}{}:
				default:
					log.G(ctx).Warnf("there are %d connections to ports of the pod, the limit", maxConnections)
					reset(conn)
					continue
				}
				wg.Go(func() {
					defer func() { <-turns }()
					forward(ctx, conn, key == keyIPv6, dial)
				})
			}
		})
	}
	wg.Wait()
}

func pause(ctx context.Context, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
}

// reset closes a connection so that its other end sees an error, not an end.
func reset(conn *net.TCPConn) {
	_ = conn.SetLinger(0)
	_ = conn.Close()
}

// forward connects one connection with the port that it was meant for, until both ways have ended, or ctx does.
func forward(ctx context.Context, conn *net.TCPConn, ipv6 bool, dial Dial) {
	port := conn.LocalAddr().(*net.TCPAddr).AddrPort().Port()
	guest, err := dial(ctx, port, ipv6)
	if err != nil {
		log.G(ctx).WithError(err).WithField("port", port).Info("a connection to a port of the pod was reset")
		reset(conn)
		return
	}
	stop := context.AfterFunc(ctx, func() {
		reset(conn)
		_ = guest.Close()
	})
	defer stop()
	var wg sync.WaitGroup
	one := func(to, from interface {
		net.Conn
		CloseWrite() error
	}) {
		if _, err := io.Copy(to, from); err == nil && to.CloseWrite() == nil {
			return
		}
		reset(conn)
		_ = guest.Close()
	}
	wg.Go(func() { one(guest, conn) })
	wg.Go(func() { one(conn, guest) })
	wg.Wait()
	_ = conn.Close()
	_ = guest.Close()
}
