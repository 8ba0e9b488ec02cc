// SPDX-License-Identifier: Apache-2.0

package virtcontainers

import (
	"context"
	"net"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	agentv1 "github.com/cloister-project/cloister/agent-protocol/v1"
	"github.com/cloister-project/cloister/agent-protocol/wire"
)

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
			hello, err := shakeHands(host)
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
