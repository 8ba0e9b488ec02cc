// SPDX-License-Identifier: Apache-2.0

package qmp

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const greeting = `{"QMP": {"version": {"qemu": {"micro": 2, "minor": 0, "major": 10}, "package": ""}, "capabilities": ["oob"]}}`

type command struct {
	Execute   string          `json:"execute"`
	Arguments json.RawMessage `json:"arguments"`
	ID        uint64          `json:"id"`
}

// server answers each command with what serve returns; an empty string answers nothing.
func server(t *testing.T, serve func(command) string) net.Conn {
	t.Helper()
	ours, theirs := net.Pipe()
	var wg sync.WaitGroup
	wg.Go(func() {
		defer theirs.Close()
		if _, err := io.WriteString(theirs, greeting+"\r\n"); err != nil {
			return
		}
		r := bufio.NewReader(theirs)
		for {
			line, err := r.ReadBytes('\n')
			if err != nil {
				return
			}
			var c command
			if err := json.Unmarshal(line, &c); err != nil {
				return
			}
			answer := fmt.Sprintf(`{"return": {}, "id": %d}`, c.ID)
			if c.Execute != "qmp_capabilities" && serve != nil {
				answer = serve(c)
			}
			if answer == "close" {
				return
			}
			if answer != "" {
				if _, err := io.WriteString(theirs, answer+"\r\n"); err != nil {
					return
				}
			}
		}
	})
	t.Cleanup(func() { ours.Close(); wg.Wait() })
	return ours
}

func connect(t *testing.T, conn net.Conn, handler func(Event)) *Client {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	c, err := New(ctx, conn, handler)
	require.NoError(t, err)
	t.Cleanup(func() { c.Close(); <-c.Done() })
	return c
}

func TestExecute(t *testing.T) {
	c := connect(t, server(t, func(c command) string {
		switch c.Execute {
		case "query-status":
			return fmt.Sprintf(`{"return": {"status": "running"}, "id": %d}`, c.ID)
		case "echo":
			return fmt.Sprintf(`{"return": %s, "id": %d}`, c.Arguments, c.ID)
		case "device_del":
			return fmt.Sprintf(`{"error": {"class": "DeviceNotFound", "desc": "Device 'x' not found"}, "id": %d}`, c.ID)
		case "odd":
			return fmt.Sprintf(`{"return": [1], "id": %d}`, c.ID)
		}
		return fmt.Sprintf(`{"error": {"class": "CommandNotFound", "desc": "no"}, "id": %d}`, c.ID)
	}), nil)
	ctx := context.Background()
	var status struct{ Status string }
	require.NoError(t, c.Execute(ctx, "query-status", nil, &status))
	require.Equal(t, "running", status.Status)

	err := c.Execute(ctx, "device_del", map[string]string{"id": "x"}, nil)
	var refused *Error
	require.ErrorAs(t, err, &refused)
	require.Equal(t, "device_del", refused.Command)
	require.ErrorIs(t, err, errdefs.ErrNotFound)
	require.ErrorContains(t, err, "Device 'x' not found")
	require.ErrorIs(t, c.Execute(ctx, "unknown", nil, nil), errdefs.ErrNotImplemented)
	require.ErrorContains(t, c.Execute(ctx, "odd", nil, &status), "not understood")

	var wg sync.WaitGroup
	for i := range 50 {
		wg.Go(func() {
			var got struct{ N int }
			if err := c.Execute(ctx, "echo", map[string]int{"n": i}, &got); err != nil || got.N != i {
				t.Errorf("echo %d: %+v, %v", i, got, err)
			}
		})
	}
	wg.Wait()
}

func TestRepliesOutOfOrderAndLate(t *testing.T) {
	var held uint64
	c := connect(t, server(t, func(c command) string {
		if c.Execute == "slow" {
			held = c.ID
			return ""
		}
		// The late reply, one to an id that never was, and the wanted one.
		return fmt.Sprintf(`{"return": {"late": true}, "id": %d}`+"\n"+`{"return": {}, "id": 999}`+"\n"+`{"return": {"ok": true}, "id": %d}`,
			held, c.ID)
	}), nil)
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Millisecond)
	defer cancel()
	require.ErrorIs(t, c.Execute(ctx, "slow", nil, nil), context.DeadlineExceeded)
	var got struct{ OK, Late bool }
	require.NoError(t, c.Execute(context.Background(), "fast", nil, &got))
	require.True(t, got.OK)
	require.False(t, got.Late)
}

func TestEventsDoNotDelayReplies(t *testing.T) {
	release, seen := make(chan struct{}), make(chan Event, 10)
	c := connect(t, server(t, func(c command) string {
		return `{"timestamp": {"seconds": 5, "microseconds": 7}, "event": "STOP"}` + "\n" +
			`{"timestamp": {"seconds": 6, "microseconds": 0}, "event": "SHUTDOWN", "data": {"reason": "guest-reset"}}` + "\n" +
			fmt.Sprintf(`{"return": {}, "id": %d}`, c.ID)
	}), func(e Event) {
		<-release
		seen <- e
	})
	require.NoError(t, c.Execute(context.Background(), "stop", nil, nil))
	close(release)
	first, second := <-seen, <-seen
	require.Equal(t, "STOP", first.Name)
	require.Equal(t, int64(5000007), first.Time.UnixMicro())
	require.Equal(t, "SHUTDOWN", second.Name)
	require.JSONEq(t, `{"reason": "guest-reset"}`, string(second.Data))
}

func TestLastEventsBeforeDone(t *testing.T) {
	var names []string
	c := connect(t, server(t, func(command) string {
		return strings.Repeat(`{"event": "E", "timestamp": {"seconds": 1, "microseconds": 0}}`+"\n", 100) + `{"event": "LAST"}` + "\n" +
			`{"error": {"class": "x", "desc": "bye"}}`
	}), func(e Event) { names = append(names, e.Name) })
	require.Error(t, c.Execute(context.Background(), "x", nil, nil))
	<-c.Done()
	require.Len(t, names, 101)
	require.Equal(t, "LAST", names[100])
	require.ErrorContains(t, c.Err(), "bye")
}

func TestBrokenServers(t *testing.T) {
	for _, tc := range []struct {
		name   string
		answer string
		says   string
		is     error
	}{
		{"closes", "close", "closed", io.EOF},
		{"no JSON", "hello", "not understood", nil},
		{"wrong types", `{"event": 5}`, "not understood", nil},
		{"too long", `{"return": "` + strings.Repeat("x", MaxMessage) + `"}`, "more than", errdefs.ErrResourceExhausted},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c := connect(t, server(t, func(command) string { return tc.answer }), nil)
			err := c.Execute(context.Background(), "x", nil, nil)
			require.ErrorContains(t, err, tc.says)
			if tc.is != nil {
				require.ErrorIs(t, err, tc.is)
			}
			<-c.Done()
			require.ErrorContains(t, c.Execute(context.Background(), "y", nil, nil), tc.says)
		})
	}
}

func TestEventFlood(t *testing.T) {
	block := make(chan struct{})
	var once sync.Once
	c := connect(t, server(t, func(command) string {
		return strings.Repeat(`{"event": "E", "timestamp": {"seconds": 1, "microseconds": 0}}`+"\n", 2*maxEvents+2)
	}), func(Event) { <-block })
	defer once.Do(func() { close(block) })
	errs := make(chan error, 1)
	go func() { errs <- c.Execute(context.Background(), "x", nil, nil) }()
	require.Eventually(t, func() bool { return c.Err() != nil }, 5*time.Second, time.Millisecond)
	once.Do(func() { close(block) })
	require.ErrorIs(t, <-errs, errdefs.ErrResourceExhausted)
}

func TestNewFails(t *testing.T) {
	ours, theirs := net.Pipe()
	theirs.Close()
	_, err := New(context.Background(), ours, nil)
	require.ErrorIs(t, err, io.EOF)

	ours, theirs = net.Pipe()
	defer theirs.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Millisecond)
	defer cancel()
	_, err = New(ctx, ours, nil)
	require.ErrorIs(t, err, context.DeadlineExceeded)
}

func TestCloseEndsPending(t *testing.T) {
	reached := make(chan struct{})
	c := connect(t, server(t, func(command) string { close(reached); return "" }), nil)
	errs := make(chan error, 1)
	go func() { errs <- c.Execute(context.Background(), "x", nil, nil) }()
	<-reached
	require.NoError(t, c.Close())
	require.NoError(t, c.Close())
	require.ErrorIs(t, <-errs, ErrClosed)
}

func FuzzRead(f *testing.F) {
	f.Add([]byte(greeting + "\r\n" + `{"return": {}, "id": 1}` + "\n"))
	f.Add([]byte(greeting + "\n" + `{"error": {"class": "GenericError", "desc": "no"}, "id": 1}` + "\n"))
	f.Add([]byte(greeting + "\n" +
		`{"event": "SHUTDOWN", "data": {"guest": true, "reason": "guest-reset"}, "timestamp": {"seconds": 1, "microseconds": 2}}` + "\n"))
	f.Add([]byte(greeting + "\n" + greeting + "\n" + `{"id": -1, "return": 7}` + "\n\n[]\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		ours, theirs := net.Pipe()
		var wg sync.WaitGroup
		wg.Go(func() { _, _ = io.Copy(io.Discard, theirs) })
		wg.Go(func() {
			_, _ = theirs.Write(b)
			theirs.Close()
		})
		c, err := New(context.Background(), ours, nil)
		if err == nil {
			var out map[string]any
			err = c.Execute(context.Background(), "query-status", nil, &out)
			c.Close()
			<-c.Done()
		}
		ours.Close()
		wg.Wait()
		if err == nil {
			return
		}
		var refused *Error
		_ = errors.As(err, &refused)
	})
}
