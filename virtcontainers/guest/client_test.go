// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
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
)

// What a guest puts into an error reaches people's terminals, and must not keep the shim busy.
func TestErrorOf(t *testing.T) {
	hostile := status.New(codes.NotFound, "\x1b[2Jno such\nthing\u009b"+strings.Repeat("x", 1<<20))
	for range 4 { // each is a detail of the next
		nested, err := status.New(codes.NotFound, hostile.Message()).WithDetails(protoadapt.MessageV1Of(hostile.Proto()))
		require.NoError(t, err)
		hostile = nested
	}
	err := errorOf(hostile.Err())
	require.ErrorIs(t, err, errdefs.ErrNotFound)
	require.True(t, strings.HasPrefix(err.Error(), "?[2Jno such\nthing?xxx"), "%.40q", err.Error())
	require.Less(t, len(err.Error()), 2*maxError)

	require.ErrorIs(t, errorOf(ttrpc.ErrClosed), errdefs.ErrUnavailable)
	require.ErrorContains(t, errorOf(errors.New("of this side")), "of this side")
	require.ErrorIs(t, errorOf(status.Error(codes.FailedPrecondition, "größer")), errdefs.ErrFailedPrecondition)
	require.ErrorContains(t, errorOf(status.Error(codes.FailedPrecondition, "größer")), "größer")
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
			hello, err := shakeHands(host, wire.NewToken(), func(*agentv1.Hello) error { return nil })
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

func TestWord(t *testing.T) {
	require.Equal(t, "6.12??-?x", Word("6.12\x1b\n =x"))
	require.Len(t, Word(string(make([]byte, 4096))), 128)
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
		_, err := shakeHands(host, wire.NewToken(), func(*agentv1.Hello) error { return nil })
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
	other := fmt.Errorf("its guest says another platform: %w", errdefs.ErrFailedPrecondition)
	_, err := shakeHands(host, wire.NewToken(), func(h *agentv1.Hello) error {
		require.Equal(t, "snp", h.GetTee())
		return other
	})
	require.Equal(t, other, err)
	require.Equal(t, other.Error(), (<-replies).GetError())
}

// A hostile guest's first bytes, whatever they are, end in a Hello within bounds or in an error.
func FuzzHandshake(f *testing.F) {
	for _, h := range []*agentv1.Hello{
		{ProtocolMajor: wire.Major, AgentVersion: "v1"}, {ProtocolMajor: wire.Major + 1}, {Refusal: "no\x1b[2J"},
		{ProtocolMajor: wire.Major, BootTimeline: make([]*agentv1.BootMark, 2*maxBootMarks)},
	} {
		var b bytes.Buffer
		if err := wire.WriteFrame(&b, h); err != nil {
			f.Fatal(err)
		}
		f.Add(b.Bytes())
	}
	f.Add([]byte{0xff, 0xff, 0xff, 0xff})
	f.Fuzz(func(t *testing.T, sent []byte) {
		host, agent := net.Pipe()
		defer host.Close()
		go func() {
			_, _ = agent.Write(sent)
			_ = wire.ReadFrame(agent, &agentv1.HelloReply{})
			_ = agent.Close()
		}()
		hello, err := shakeHands(host, wire.NewToken(), func(*agentv1.Hello) error { return nil })
		if err != nil {
			require.Nil(t, hello)
			return
		}
		require.EqualValues(t, wire.Major, hello.GetProtocolMajor())
		require.LessOrEqual(t, len(hello.GetBootTimeline()), maxBootMarks)
	})
}

// Whatever a guest says is short and harmless once it is quoted.
func FuzzWords(f *testing.F) {
	f.Add("6.12.0-cloister")
	f.Add("\x1b[2J\u009bgr\u00f6\u00dfer\n\xff")
	f.Add(strings.Repeat("x", maxError+1))
	f.Fuzz(func(t *testing.T, s string) {
		for _, quoted := range []string{Word(s), sentence(s)} {
			require.LessOrEqual(t, len(quoted), maxSentence+len("..."))
			require.Empty(t, strings.Trim(quoted, printableASCII()))
		}
		require.NotContains(t, Word(s), " ")
		quoted := text(s)
		require.LessOrEqual(t, len(quoted), maxError+len("..."))
		require.NotContains(t, quoted, "\x1b")
	})
}

func printableASCII() string {
	var b strings.Builder
	for r := ' '; r <= '~'; r++ {
		b.WriteRune(r)
	}
	return b.String()
}

// A pod without a guest has a client as well: it says why there is no guest, in every call.
func TestLost(t *testing.T) {
	gone := fmt.Errorf("the sandbox has ended: %w", errdefs.ErrUnavailable)
	c := Lost(gone)
	require.Equal(t, gone, c.Err())
	require.Equal(t, gone, c.Ping(t.Context()))
	require.Equal(t, gone, c.Shutdown(t.Context()))
	require.Equal(t, gone, c.DiscardContainer(t.Context(), "c"))
	_, err := c.WaitProcess(t.Context(), Process{Container: "c"})
	require.Equal(t, gone, err)
	_, err = c.ContainerStats(t.Context(), "c")
	require.Equal(t, gone, err)
	_, _, err = c.OpenStdio(t.Context(), Stdio{Stdout: true})
	require.Equal(t, gone, err)
	require.ErrorIs(t, c.WatchEvents(t.Context(), func(*agentv1.Event) {}), errdefs.ErrUnavailable)
	c.Close()
}

// agentEvents is an agent that answers NextEvents with the same answers in turn.
type agentEvents struct {
	agentv1.AgentService
	answers []*agentv1.NextEventsResponse
	asked   []uint64
}

func (a *agentEvents) NextEvents(_ context.Context, r *agentv1.NextEventsRequest) (*agentv1.NextEventsResponse, error) {
	a.asked = append(a.asked, r.GetAfter())
	answer := a.answers[0]
	a.answers = a.answers[1:]
	return answer, nil
}

func TestWatchEventsEndsWithAnAgentThatHasNoNews(t *testing.T) {
	events := func(sequence ...uint64) *agentv1.NextEventsResponse {
		r := &agentv1.NextEventsResponse{}
		for _, s := range sequence {
			r.Events = append(r.Events, &agentv1.Event{Sequence: s})
		}
		return r
	}
	a := &agentEvents{answers: []*agentv1.NextEventsResponse{events(1, 2), events(2, 5, 4), events(5)}}
	var handled []uint64
	err := (&Client{waits: a}).WatchEvents(t.Context(), func(e *agentv1.Event) { handled = append(handled, e.GetSequence()) })
	require.ErrorContains(t, err, "without a new event")
	require.Equal(t, []uint64{1, 2, 5}, handled)
	require.Equal(t, []uint64{0, 2, 5}, a.asked)
}
