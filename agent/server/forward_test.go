// SPDX-License-Identifier: Apache-2.0

package server

import (
	"fmt"
	"io"
	"net"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"

	agentv1 "github.com/cloister-project/cloister/agent-protocol/v1"
	"github.com/cloister-project/cloister/agent-protocol/wire"
)

func TestForwardPort(t *testing.T) {
	h := boot(t, good())
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	require.NoError(t, err)
	defer l.Close()
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			n, _ := io.Copy(io.Discard, conn)
			_, _ = fmt.Fprintf(conn, "%d bytes", n)
			_ = conn.Close()
		}
	}()
	port := uint32(l.Addr().(*net.TCPAddr).Port)
	stream := func() (net.Conn, string) {
		conn, id := h.dial(wire.StreamPort), wire.NewStreamID()
		require.NoError(t, wire.OpenStream(conn, testToken, id))
		return conn, id.String()
	}

	conn, id := stream()
	_, err = h.client.ForwardPort(ctx(t), &agentv1.ForwardPortRequest{Stream: id, Port: port})
	require.NoError(t, err)
	_, err = conn.Write(make([]byte, 100_000))
	require.NoError(t, err)
	require.NoError(t, conn.(*net.UnixConn).CloseWrite())
	got, err := io.ReadAll(conn)
	require.NoError(t, err)
	require.Equal(t, "100000 bytes", string(got))

	closed, err := net.Listen("tcp4", "127.0.0.1:0")
	require.NoError(t, err)
	nobody := uint32(closed.Addr().(*net.TCPAddr).Port)
	require.NoError(t, closed.Close())
	conn, id = stream()
	for name, tc := range map[string]struct {
		r    *agentv1.ForwardPortRequest
		want string
	}{
		"no stream":      {&agentv1.ForwardPortRequest{Port: port}, "InvalidArgument"},
		"unknown stream": {&agentv1.ForwardPortRequest{Stream: wire.NewStreamID().String(), Port: port}, "FailedPrecondition"},
		"nobody listens": {&agentv1.ForwardPortRequest{Stream: id, Port: nobody}, "connection refused"},
		"port 0":         {&agentv1.ForwardPortRequest{Port: 0}, "port 0 is not"},
		"port 65536":     {&agentv1.ForwardPortRequest{Port: 65536}, "port 65536 is not"},
	} {
		t.Run(name, func(t *testing.T) {
			if tc.r.GetStream() == "" && name != "no stream" {
				_, tc.r.Stream = stream()
			}
			_, err := h.client.ForwardPort(ctx(t), tc.r)
			require.ErrorContains(t, err, tc.want)
		})
	}
	_, err = io.ReadAll(conn)
	require.NoError(t, err, "its stream is closed")
}

// A confidential guest lets its host to no port of its loopback, whatever else the request says.
func TestForwardPortOfAConfidentialGuest(t *testing.T) {
	s := &service{New(Config{Platform: "snp"})}
	near, far := net.Pipe()
	id := wire.NewStreamID()
	require.NoError(t, s.streams.Offer(id, near))
	_, err := s.ForwardPort(t.Context(), &agentv1.ForwardPortRequest{Stream: id.String(), Port: 80})
	require.ErrorIs(t, err, errdefs.ErrFailedPrecondition)
	require.ErrorContains(t, err, "confidential guest (platform snp)")
	_, err = far.Read(make([]byte, 1))
	require.ErrorIs(t, err, io.EOF, "its stream is closed")
}
