// SPDX-License-Identifier: Apache-2.0

package vhostuser

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cloister-project/cloister/hypervisor/vsock"
)

func TestSlowReaderStopsNobodyElse(t *testing.T) {
	r := startRig(t, Config{})
	r.g.listen(1, func(c *guestConn) { _, _ = c.Write(make([]byte, 1<<20)) })
	r.g.listen(1025, echo)
	var slow []vsock.Conn
	for range 5 {
		slow = append(slow, r.dial(1))
	}
	// Neither a guest that does not read.
	r.g.listen(2, func(c *guestConn) {})
	for range 5 {
		c := r.dial(2)
		r.g.wg.Add(1)
		go func() {
			defer r.g.wg.Done()
			_, _ = c.Write(make([]byte, 1<<20))
		}()
	}
	c := r.dial(1025)
	roundTrip(t, c, random(2<<20))
	for _, s := range slow {
		n, err := io.CopyN(io.Discard, s, 1<<20)
		require.NoError(t, err)
		require.EqualValues(t, 1<<20, n)
	}
	require.NoError(t, r.d.Close())
}

// roundTrip sends data to an echo server and checks what comes back.
func roundTrip(t testing.TB, c vsock.Conn, data []byte) {
	if err := tryRoundTrip(c, data); err != nil {
		t.Error(err)
	}
}

func tryRoundTrip(c vsock.Conn, data []byte) error {
	sent := make(chan error, 1)
	go func() {
		_, err := c.Write(data)
		sent <- errors.Join(err, c.CloseWrite())
	}()
	h := sha256.New()
	n, err := io.Copy(h, c)
	if err := errors.Join(<-sent, err); err != nil {
		return err
	}
	if want := sha256.Sum256(data); n != int64(len(data)) || !bytes.Equal(want[:], h.Sum(nil)) {
		return fmt.Errorf("%d of %d bytes came back, or other ones", n, len(data))
	}
	return c.Close()
}

func TestBulk(t *testing.T) {
	for _, split := range []bool{false, true} {
		t.Run(fmt.Sprintf("split=%t", split), func(t *testing.T) {
			r := newRig(t, Config{})
			r.g.split = split
			r.fe.start([2]uint32{})
			r.g.run(40)
			r.g.listen(1025, echo)
			roundTrip(t, r.dial(1025), random(20<<20))
			r.noStreams()
		})
	}
}

func TestManyStreams(t *testing.T) {
	r := startRig(t, Config{})
	r.g.listen(1025, echo)
	data := random(100 << 10)
	var wg sync.WaitGroup
	for i := range 200 {
		c := r.dial(1025)
		wg.Add(1)
		go func() {
			defer wg.Done()
			roundTrip(t, c, data[i:])
		}()
	}
	wg.Wait()
	r.noStreams()
}

func TestConcurrentUse(t *testing.T) {
	r := startRig(t, Config{})
	r.g.listen(1025, echo)
	c := r.dial(1025)
	var wg sync.WaitGroup
	var mu sync.Mutex
	total := 0
	for range 4 {
		wg.Add(2)
		go func() {
			defer wg.Done()
			for range 50 {
				_, err := c.Write(make([]byte, 1000))
				if err != nil {
					t.Error(err)
				}
			}
		}()
		go func() {
			defer wg.Done()
			b := make([]byte, 500)
			for {
				n, err := c.Read(b)
				mu.Lock()
				total += n
				if total == 4*50*1000 {
					_ = c.SetReadDeadline(time.Unix(1, 0))
				}
				mu.Unlock()
				if err != nil {
					return
				}
			}
		}()
	}
	wg.Wait()
	require.Equal(t, 4*50*1000, total)
}

func TestCloseDuringTraffic(t *testing.T) {
	r := startRig(t, Config{CloseTimeout: 50 * time.Millisecond})
	r.g.listen(1025, echo)
	var wg sync.WaitGroup
	for i := range 20 {
		c := r.dial(1025)
		wg.Add(2)
		go func() {
			defer wg.Done()
			_, err := io.Copy(c, neverEnding{})
			if !errors.Is(err, net.ErrClosed) {
				t.Errorf("write: %v", err)
			}
		}()
		go func() {
			defer wg.Done()
			_, _ = io.CopyN(io.Discard, c, int64(i)<<12)
			_ = c.Close()
		}()
	}
	wg.Wait()
	r.noStreams()
}

type neverEnding struct{}

func (neverEnding) Read(p []byte) (int, error) { return len(p), nil }
