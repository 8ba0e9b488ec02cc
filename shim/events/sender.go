// SPDX-License-Identifier: Apache-2.0

package events

import (
	"context"
	"errors"
	"fmt"
	"time"

	eventsapi "github.com/containerd/containerd/api/services/ttrpc/events/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/containerd/v2/pkg/ttrpcutil"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
)

// sendTime bounds one attempt.
const sendTime = 5 * time.Second

// Sender talks to containerd's event service. Its connection is made when needed and again after it broke.
type Sender struct {
	client *ttrpcutil.Client
}

// NewSender for containerd's ttrpc address (TTRPC_ADDRESS).
func NewSender(address string) (*Sender, error) {
	client, err := ttrpcutil.NewClient(address)
	if err != nil {
		return nil, err
	}
	return &Sender{client: client}, nil
}

// Send is a Send function.
func (s *Sender) Send(ctx context.Context, e *types.Envelope) error {
	ctx, cancel := context.WithTimeout(ctx, sendTime)
	defer cancel()
	service, err := s.client.EventsService()
	if err != nil {
		return fmt.Errorf("connect to containerd: %w: %w", err, errdefs.ErrUnavailable)
	}
	_, err = service.Forward(ctx, &eventsapi.ForwardRequest{Envelope: e})
	if err == nil {
		return nil
	}
	// An answer has a kind. Anything else is the connection's fault: it is made anew by the next attempt.
	if native := errgrpc.ToNative(err); !errdefs.IsUnknown(native) && !errdefs.IsUnavailable(native) && ctx.Err() == nil {
		return native
	}
	if rerr := s.client.Reconnect(); rerr != nil {
		err = errors.Join(err, rerr)
	}
	return fmt.Errorf("forward an event: %w: %w", err, errdefs.ErrUnavailable)
}

// Close ends the connection.
func (s *Sender) Close() error { return s.client.Close() }
