// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"context"
	"io"
	"net"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/cloister-project/cloister/agent-protocol/wire"
	"github.com/cloister-project/cloister/hypervisor/vsock"
)

// doorkeeper is a transport whose guest does with each connection what its turn says: hang up before or after the token was
// read, refuse, accept, or keep silent.
type doorkeeper struct {
	vsock.Transport
	t     *testing.T
	token wire.Token
	turns []string

	mu  sync.Mutex
	ids []wire.StreamID
}

func (d *doorkeeper) Dial(_ context.Context, port uint32) (vsock.Conn, error) {
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(d.t.TempDir(), "s")})
	require.NoError(d.t, err)
	defer l.Close()
	conn, err := net.DialUnix("unix", nil, l.Addr().(*net.UnixAddr))
	require.NoError(d.t, err)
	other, err := l.Accept()
	require.NoError(d.t, err)
	turn := d.turns[0]
	d.turns = d.turns[1:]
	if turn == "hang up at once" {
		require.NoError(d.t, other.Close())
		return conn, nil
	}
	go func() {
		defer other.Close()
		if token, err := wire.ReadToken(other); err != nil || !token.Equal(d.token) {
			return
		}
		if port == wire.StreamPort {
			id, err := wire.ReadStreamID(other)
			if err != nil {
				return
			}
			d.mu.Lock()
			d.ids = append(d.ids, id)
			d.mu.Unlock()
		}
		switch turn {
		case "hang up":
			return
		case "refuse":
			_, _ = other.Write([]byte{wire.Refused})
			return
		case "accept":
			_, _ = other.Write([]byte{wire.Accepted})
		}
		_, _ = io.Copy(io.Discard, other)
	}()
	return conn, nil
}

// A connection that is pushed out by others' is tried again, with a new id; one that is refused is not.
func TestOpenStream(t *testing.T) {
	defer goleak.VerifyNone(t)
	token := wire.NewToken()
	for name, tc := range map[string]struct {
		token wire.Token
		turns []string
		want  string
	}{
		"accepted":        {token, []string{"accept"}, ""},
		"pushed out":      {token, []string{"hang up at once", "hang up", "accept"}, ""},
		"refused":         {token, []string{"refuse"}, "the agent refused it"},
		"always hung up":  {token, []string{"hang up", "hang up", "hang up", "hang up", "hang up"}, "read the agent's answer"},
		"not its own VM":  {wire.NewToken(), []string{"", "", "", "", ""}, "read the agent's answer"},
		"without a word":  {token, []string{"silence"}, "deadline exceeded"},
		"pushed out once": {token, []string{"hang up", "refuse"}, "the agent refused it"},
	} {
		t.Run(name, func(t *testing.T) {
			d := &doorkeeper{t: t, token: token, turns: tc.turns}
			c := &Client{transport: d, token: tc.token}
			limit := time.Minute
			if name == "without a word" {
				limit = 50 * time.Millisecond
			}
			ctx, cancel := context.WithTimeout(t.Context(), limit)
			defer cancel()
			conn, id, err := c.openStream(ctx)
			require.Empty(t, d.turns, "every turn was taken")
			if tc.want != "" {
				require.ErrorContains(t, err, tc.want)
				require.NotContains(t, err.Error(), string(token[:]))
				return
			}
			require.NoError(t, err)
			d.mu.Lock()
			defer d.mu.Unlock()
			require.Equal(t, d.ids[len(d.ids)-1], id)
			if len(d.ids) > 1 {
				require.NotEqual(t, d.ids[0], id)
			}
			require.NoError(t, conn.Close())
		})
	}
}
