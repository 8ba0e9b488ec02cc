// SPDX-License-Identifier: Apache-2.0

package server

import (
	"bytes"
	"errors"
	"io"
	"net"
	"runtime"
	"testing"
	"time"

	"github.com/containerd/log"
	"github.com/sirupsen/logrus"
	"github.com/sirupsen/logrus/hooks/test"
	"github.com/stretchr/testify/require"

	agentv1 "github.com/cloister-project/cloister/agent-protocol/v1"
	"github.com/cloister-project/cloister/agent-protocol/wire"
)

// requireHungUp checks that the agent closes a connection, without a word.
func requireHungUp(t *testing.T, conn net.Conn) {
	t.Helper()
	require.NoError(t, conn.SetReadDeadline(time.Now().Add(30*time.Second)))
	n, err := conn.Read(make([]byte, 1))
	require.Zero(t, n)
	require.Error(t, err)
	var timeout net.Error
	require.False(t, errors.As(err, &timeout) && timeout.Timeout(), "it is still open")
}

// A connection without the launch's token gets nothing, on either port.
func TestStrangers(t *testing.T) {
	h := boot(t, good())
	wrong := testToken
	wrong[wire.TokenLen-1] ^= 1
	id := wire.NewStreamID()
	request := []byte("\x00\x00\x00\x08\x00\x00\x00\x01\x01\x00PingPing") // ttrpc's header and some bytes
	for name, opening := range map[string][]byte{
		"another token": wrong[:],
		"no token":      append(request, make([]byte, 64)...),
		"zeros":         make([]byte, wire.TokenLen),
		"a stream's id": append(id[:], make([]byte, wire.TokenLen)...),
	} {
		for _, port := range []uint32{wire.RPCPort, wire.StreamPort} {
			t.Run(name, func(t *testing.T) {
				conn := h.dial(port)
				_, err := conn.Write(opening)
				require.NoError(t, err)
				requireHungUp(t, conn)
			})
		}
	}
	short := h.dial(wire.RPCPort)
	_, err := short.Write(testToken[:wire.TokenLen-1])
	require.NoError(t, err)
	require.NoError(t, short.(*net.UnixConn).CloseWrite())
	requireHungUp(t, short)

	require.NoError(t, wire.OpenStream(h.dial(wire.StreamPort), testToken, id), "the id was not taken by a stranger")
	_, err = h.rpc().Ping(ctx(t), &agentv1.PingRequest{})
	require.NoError(t, err)
}

// Idle connections block nobody and cost no more than so many goroutines and so many lines of the log.
func TestIdleStrangers(t *testing.T) {
	logged := test.NewLocal(log.L.Logger)
	t.Cleanup(func() { log.L.Logger.ReplaceHooks(logrus.LevelHooks{}) })
	h := boot(t, good())
	before := runtime.NumGoroutine()
	idle := make([]net.Conn, 4*maxUnproven)
	for i := range idle {
		idle[i] = h.dial([]uint32{wire.RPCPort, wire.StreamPort}[i%2])
	}
	_, err := h.rpc().Ping(ctx(t), &agentv1.PingRequest{})
	require.NoError(t, err)
	require.NoError(t, wire.OpenStream(h.dial(wire.StreamPort), testToken, wire.NewStreamID()))
	for i := range 2 * maxUnproven {
		requireHungUp(t, idle[i])
	}
	require.Eventually(t, func() bool { return runtime.NumGoroutine() <= before+maxUnproven+16 }, 30*time.Second, time.Millisecond)
	warnings := 0
	for _, e := range logged.AllEntries() {
		if e.Level <= logrus.WarnLevel {
			warnings++
		}
	}
	require.NotZero(t, warnings)
	require.LessOrEqual(t, warnings, 4, "1, 10, 100 and 1000")
	// They all end with the agent.
	require.NoError(t, h.ready.Close())
	require.ErrorIs(t, h.ended(), errHungUp)
	for _, conn := range idle {
		requireHungUp(t, conn)
	}
}

func TestGateClosed(t *testing.T) {
	g := &gate{token: testToken}
	for _, late := range []bool{false, true} {
		ours, theirs := net.Pipe()
		if late {
			g.close()
		}
		g.enter(ours)
		if !late {
			g.close()
		}
		_, err := theirs.Read(make([]byte, 1))
		require.ErrorIs(t, err, io.EOF)
		require.Error(t, g.prove(ours))
	}
}

// Whatever a stranger sends, it does not come through.
func FuzzGate(f *testing.F) {
	f.Add([]byte{})
	f.Add(make([]byte, wire.TokenLen))
	f.Add(testToken[:wire.TokenLen-1])
	f.Add(bytes.Repeat([]byte{0xff}, 1<<10))
	f.Fuzz(func(t *testing.T, sent []byte) {
		if bytes.HasPrefix(sent, testToken[:]) {
			t.Skip("no stranger")
		}
		g := &gate{token: testToken}
		ours, theirs := net.Pipe()
		go func() {
			_, _ = theirs.Write(sent)
			_ = theirs.Close()
		}()
		g.enter(ours)
		require.Error(t, g.prove(ours))
		require.Empty(t, g.unproven)
		_, err := ours.Write([]byte{0})
		require.Error(t, err)
	})
}
