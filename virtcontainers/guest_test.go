// SPDX-License-Identifier: Apache-2.0

package virtcontainers

import (
	"context"
	"errors"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/ttrpc"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/protoadapt"

	agentv1 "github.com/cloister-project/cloister/agent-protocol/v1"
	"github.com/cloister-project/cloister/agent-protocol/wire"
	"github.com/cloister-project/cloister/tee"
)

// What a guest puts into an error reaches people's terminals, and must not keep the shim busy.
func TestGuestError(t *testing.T) {
	hostile := status.New(codes.NotFound, "\x1b[2Jno such\nthing\u009b"+strings.Repeat("x", 1<<20))
	for range 4 { // each is a detail of the next
		nested, err := status.New(codes.NotFound, hostile.Message()).WithDetails(protoadapt.MessageV1Of(hostile.Proto()))
		require.NoError(t, err)
		hostile = nested
	}
	err := guestError(hostile.Err())
	require.ErrorIs(t, err, errdefs.ErrNotFound)
	require.True(t, strings.HasPrefix(err.Error(), "?[2Jno such\nthing?xxx"), "%.40q", err.Error())
	require.Less(t, len(err.Error()), 2*maxGuestError)

	require.ErrorIs(t, guestError(ttrpc.ErrClosed), errdefs.ErrUnavailable)
	require.ErrorContains(t, guestError(errors.New("of this side")), "of this side")
	require.ErrorIs(t, guestError(status.Error(codes.FailedPrecondition, "größer")), errdefs.ErrFailedPrecondition)
	require.ErrorContains(t, guestError(status.Error(codes.FailedPrecondition, "größer")), "größer")
}

func TestHandshake(t *testing.T) {
	for _, tc := range []struct {
		name  string
		major uint32
		want  string
	}{{"same version", wire.Major, ""}, {"other version", wire.Major + 1, "install shim and guest image of the same release"}} {
		t.Run(tc.name, func(t *testing.T) {
			host, agent := net.Pipe()
			defer host.Close()
			defer agent.Close()
			replies := make(chan *agentv1.HelloReply, 1)
			go func() {
				_ = wire.WriteFrame(agent, &agentv1.Hello{ProtocolMajor: tc.major, AgentVersion: "v9"})
				reply := &agentv1.HelloReply{}
				_ = wire.ReadFrame(agent, reply)
				replies <- reply
			}()
			hello, err := shakeHands(host, func(*agentv1.Hello) error { return nil })
			reply := <-replies
			if tc.want == "" {
				require.NoError(t, err)
				require.Equal(t, "v9", hello.GetAgentVersion())
				require.Empty(t, reply.GetError())
				require.InDelta(t, time.Now().UnixNano(), reply.GetUnixNanos(), float64(time.Minute))
				return
			}
			require.ErrorContains(t, err, tc.want)
			require.Contains(t, reply.GetError(), tc.want, "the agent must be told as well")
		})
	}
}

func TestAcceptEndsWithTheContext(t *testing.T) {
	l, err := net.Listen("unix", t.TempDir()+"/s")
	require.NoError(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	_, err = acceptContext(ctx, l)
	require.ErrorIs(t, err, context.Canceled)
}

func TestPrintable(t *testing.T) {
	require.Equal(t, "6.12??-?x", printable("6.12\x1b\n =x"))
	require.Len(t, printable(string(make([]byte, 4096))), 128)
}

// A guest that refuses to run says why; what it says is quoted within bounds, and waits for no answer.
func TestHandshakeWithAGuestThatRefuses(t *testing.T) {
	for _, tc := range []struct{ words, want string }{
		{"the initdata disk holds another document", "the guest refuses to run: the initdata disk holds another document"},
		{"two\nlines\x1b[31m", "the guest refuses to run: two lines?[31m"},
		{strings.Repeat("x", wire.MaxFrame/2), "the guest refuses to run: " + strings.Repeat("x", maxSentence) + "..."},
	} {
		host, agent := net.Pipe()
		go func() {
			_ = wire.WriteFrame(agent, &agentv1.Hello{ProtocolMajor: wire.Major + 1, Refusal: tc.words})
			_ = agent.Close()
		}()
		_, err := shakeHands(host, func(*agentv1.Hello) error { return nil })
		require.EqualError(t, err, tc.want)
		require.ErrorIs(t, err, errdefs.ErrFailedPrecondition)
		require.NoError(t, host.Close())
	}
}

// What the host does not like of a guest's Hello is told to both.
func TestHandshakeWithAnotherLaunch(t *testing.T) {
	host, agent := net.Pipe()
	defer host.Close()
	replies := make(chan *agentv1.HelloReply, 1)
	go func() {
		defer agent.Close()
		_ = wire.WriteFrame(agent, &agentv1.Hello{ProtocolMajor: wire.Major, Tee: "snp"})
		reply := &agentv1.HelloReply{}
		_ = wire.ReadFrame(agent, reply)
		replies <- reply
	}()
	_, err := shakeHands(host, testPlan(t, testConfig(tee.None)).CheckHello)
	require.ErrorIs(t, err, errdefs.ErrFailedPrecondition)
	require.ErrorContains(t, err, `guest says "snp"`)
	require.Contains(t, (<-replies).GetError(), `guest says "snp"`)
}
