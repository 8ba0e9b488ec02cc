// SPDX-License-Identifier: Apache-2.0

package wire

import (
	"bytes"
	"io"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	agentv1 "github.com/cloister-project/cloister/agent-protocol/v1"
)

func TestFrameRoundTripLeavesTheRestAlone(t *testing.T) {
	var buf bytes.Buffer
	in := &agentv1.Hello{ProtocolMajor: Major, AgentVersion: "v1", BootTimeline: []*agentv1.BootMark{{Name: "init", Micros: 7}}}
	require.NoError(t, WriteFrame(&buf, in))
	buf.WriteString("rest")
	var out agentv1.Hello
	require.NoError(t, ReadFrame(&buf, &out))
	require.Equal(t, "v1", out.GetAgentVersion())
	require.Equal(t, "init", out.GetBootTimeline()[0].GetName())
	require.Equal(t, "rest", buf.String())
}

func TestFrameLimits(t *testing.T) {
	require.ErrorContains(t, WriteFrame(io.Discard, &agentv1.Hello{AgentVersion: strings.Repeat("x", MaxFrame)}), "over the limit")
	require.ErrorContains(t, ReadFrame(bytes.NewReader([]byte{0xff, 0xff, 0xff, 0xff}), &agentv1.Hello{}), "over the limit")
	require.ErrorIs(t, ReadFrame(bytes.NewReader([]byte{0, 0, 0, 9, 1}), &agentv1.Hello{}), io.ErrUnexpectedEOF)
}

func TestValidID(t *testing.T) {
	for _, good := range []string{"a", "0", "a.b-c_d", strings.Repeat("a", 128)} {
		require.True(t, ValidID(good), good)
	}
	for _, bad := range []string{"", ".", "..", "-a", "a/b", "a\x00", strings.Repeat("a", 129), "é"} {
		require.False(t, ValidID(bad), bad)
	}
}

// Ports below 1024 only, and neighbours do not share one.
func TestReadyPort(t *testing.T) {
	for _, cid := range []uint32{3, 4, 1022, 1023, 1024, 1<<31 - 1, 1<<32 - 1} {
		port := ReadyPort(cid)
		require.GreaterOrEqual(t, port, uint32(1))
		require.Less(t, port, uint32(1024))
		require.NotEqual(t, port, ReadyPort(cid-1))
	}
}

func FuzzReadFrame(f *testing.F) {
	var seed bytes.Buffer
	_ = WriteFrame(&seed, &agentv1.Hello{ProtocolMajor: 1, AgentVersion: "v"})
	f.Add(seed.Bytes())
	f.Add([]byte{0, 0, 0, 1, 0xff})
	f.Add([]byte{0, 1, 0, 1})
	f.Fuzz(func(t *testing.T, data []byte) {
		_ = ReadFrame(bytes.NewReader(data), &agentv1.Hello{})
	})
}
