// SPDX-License-Identifier: Apache-2.0

package server

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	agentv1 "github.com/cloister-project/cloister/agent-protocol/v1"
	"github.com/cloister-project/cloister/agent-protocol/wire"
)

const (
	// maxForwards bounds the connections to the guest's loopback that there are at a time.
	maxForwards = 128
	// forwardDial bounds one's making.
	forwardDial = 10 * time.Second
)

// forwards are connections between the host and ports of the guest's loopback.
type forwards struct {
	mu   sync.Mutex
	open int
}

func (f *forwards) enter() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.open >= maxForwards {
		return fmt.Errorf("there are %d connections to ports, the limit: %w", maxForwards, errdefs.ErrResourceExhausted)
	}
	f.open++
	return nil
}

func (f *forwards) leave() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.open--
}

func (s *service) ForwardPort(ctx context.Context, r *agentv1.ForwardPortRequest) (*agentv1.ForwardPortResponse, error) {
	id, err := wire.ParseStreamID(r.GetStream())
	if err != nil {
		return nil, fmt.Errorf("stream: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	stream, err := s.streams.Claim(id)
	if err != nil {
		return nil, err
	}
	if err := s.forward(ctx, r, stream); err != nil {
		_ = stream.Close()
		return nil, err
	}
	return &agentv1.ForwardPortResponse{}, nil
}

// forward connects the stream, which stays the caller's if it fails.
func (s *service) forward(ctx context.Context, r *agentv1.ForwardPortRequest, stream net.Conn) error {
	switch {
	case s.cfg.Platform != "":
		return fmt.Errorf("this is a confidential guest (platform %s): the host has no way to ports of its loopback: %w", s.cfg.Platform,
			errdefs.ErrFailedPrecondition)
	case r.GetPort() == 0 || r.GetPort() > 65535:
		return fmt.Errorf("port %d is not 1 to 65535: %w", r.GetPort(), errdefs.ErrInvalidArgument)
	}
	if err := s.forwards.enter(); err != nil {
		return err
	}
	network, host := "tcp4", "127.0.0.1"
	if r.GetIpv6() {
		network, host = "tcp6", "::1"
	}
	dialer := net.Dialer{Timeout: forwardDial}
	dialer.SetMultipathTCP(false)
	conn, err := dialer.DialContext(ctx, network, net.JoinHostPort(host, strconv.FormatUint(uint64(r.GetPort()), 10)))
	if err != nil {
		s.forwards.leave()
		if errors.Is(err, unix.ECONNREFUSED) {
			err = fmt.Errorf("%w: %w", err, errdefs.ErrFailedPrecondition)
		}
		return err
	}
	// It ends with either end. The guest's end ends all of them.
	go func() {
		defer s.forwards.leave()
		splice(stream, conn)
	}()
	return nil
}

// splice copies both ways until both have ended, and closes both ends.
func splice(a, b net.Conn) {
	var wg sync.WaitGroup
	for _, way := range [][2]net.Conn{{a, b}, {b, a}} {
		wg.Go(func() {
			_, err := io.Copy(way[0], way[1])
			if half, ok := way[0].(interface{ CloseWrite() error }); ok && err == nil {
				_ = half.CloseWrite()
				return
			}
			_ = a.Close()
			_ = b.Close()
		})
	}
	wg.Wait()
	_ = a.Close()
	_ = b.Close()
}
