// SPDX-License-Identifier: Apache-2.0

package procid

import (
	"context"
	"io"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// child is a real process that ends when its stdin does, if it heeds that.
type child struct {
	cmd    *exec.Cmd
	stdin  io.Closer
	reaped chan error
	ref    Ref
}

func start(t *testing.T, script string) *child {
	t.Helper()
	c := &child{cmd: exec.Command("sh", "-c", script), reaped: make(chan error, 1)}
	in, err := c.cmd.StdinPipe()
	require.NoError(t, err)
	c.stdin = in
	require.NoError(t, c.cmd.Start())
	c.ref, err = Of(c.cmd.Process.Pid)
	require.NoError(t, err)
	t.Cleanup(func() {
		_ = in.Close()
		_ = c.cmd.Process.Kill()
		_ = c.cmd.Wait()
	})
	return c
}

// descriptors counts those that are pidfds: none may be left behind.
func descriptors(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	require.NoError(t, err)
	n := 0
	for _, e := range entries {
		if target, _ := os.Readlink("/proc/self/fd/" + e.Name()); strings.Contains(target, "pidfd") {
			n++
		}
	}
	return n
}

func TestOpen(t *testing.T) {
	c := start(t, "read x")
	gone := start(t, "true")
	require.NoError(t, gone.cmd.Wait())
	before := descriptors(t)
	for name, tc := range map[string]struct {
		ref  Ref
		done bool
	}{
		"the process":              {c.ref, false},
		"itself":                   {mustOf(t, os.Getpid()), false},
		"a later one with its pid": {Ref{c.ref.PID, c.ref.Start - 1}, true},
		"one without a start time": {Ref{PID: c.ref.PID}, true},
		"gone":                     {gone.ref, true},
		"no process":               {Ref{}, true},
		"a process group":          {Ref{PID: -c.ref.PID, Start: c.ref.Start}, true},
		"a pid that cannot be":     {Ref{PID: 1 << 30, Start: 1}, true},
	} {
		t.Run(name, func(t *testing.T) {
			p, err := tc.ref.Open()
			if tc.done {
				require.ErrorIs(t, err, os.ErrProcessDone)
			} else {
				require.NoError(t, err)
				require.NoError(t, p.Signal(0))
				require.NoError(t, p.Close())
			}
			require.Equal(t, before, descriptors(t), "a descriptor is left")
		})
	}
}

func mustOf(t *testing.T, pid int) Ref {
	t.Helper()
	ref, err := Of(pid)
	require.NoError(t, err)
	return ref
}

func TestOfWithoutAProcess(t *testing.T) {
	c := start(t, "true")
	require.NoError(t, c.cmd.Wait())
	_, err := Of(c.ref.PID)
	require.ErrorIs(t, err, os.ErrNotExist)
}

func TestEnd(t *testing.T) {
	for name, tc := range map[string]struct {
		script string
		grace  time.Duration
		// closed says that stdin ends before End is called.
		closed bool
		killed bool
	}{
		"ends by itself":     {"read x", time.Minute, true, false},
		"has ended":          {"true", 0, true, true}, // a zombie takes the signal
		"does not end":       {"trap '' TERM; sleep 600 & wait", 10 * time.Millisecond, false, true},
		"is given no grace":  {"read x", 0, false, true},
		"has negative grace": {"read x", -1, false, true},
	} {
		t.Run(name, func(t *testing.T) {
			before := descriptors(t)
			c := start(t, tc.script)
			p, err := c.ref.Open()
			require.NoError(t, err)
			if tc.closed {
				require.NoError(t, c.stdin.Close())
			}
			if name == "has ended" {
				require.NoError(t, p.Wait(t.Context()))
			}
			killed, err := p.End(t.Context(), tc.grace)
			require.NoError(t, err)
			require.Equal(t, tc.killed, killed)
			require.False(t, Alive(c.ref.PID))
			err = c.cmd.Wait()
			require.Equal(t, tc.killed && name != "has ended", err != nil && strings.Contains(err.Error(), "killed"), "%v", err)
			require.ErrorIs(t, p.Signal(unix.SIGKILL), os.ErrProcessDone, "it has been reaped")
			killed, err = p.End(t.Context(), 0)
			require.NoError(t, err, "repeatable")
			require.False(t, killed)
			require.NoError(t, p.Close())
			require.GreaterOrEqual(t, before, descriptors(t), "a descriptor is left")
		})
	}
}

func TestWaitHonoursItsContext(t *testing.T) {
	c := start(t, "read x")
	p, err := c.ref.Open()
	require.NoError(t, err)
	defer p.Close()
	before := descriptors(t)

	ctx, cancel := context.WithCancel(t.Context())
	result := make(chan error, 1)
	go func() { result <- p.Wait(ctx) }()
	cancel()
	require.ErrorIs(t, <-result, context.Canceled)

	ctx, cancel = context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	require.ErrorIs(t, p.Wait(ctx), context.DeadlineExceeded)

	// Another's context does not wake this one.
	canceled, cancel := context.WithCancel(t.Context())
	cancel()
	go func() { result <- p.Wait(t.Context()) }()
	require.ErrorIs(t, p.Wait(canceled), context.Canceled)
	require.NoError(t, c.stdin.Close())
	require.NoError(t, <-result)

	// The end is known even to somebody who comes late, and whose context has ended.
	require.NoError(t, p.Wait(canceled))
	require.Equal(t, before, descriptors(t), "a descriptor is left")
}

func TestEndKillsWhenItsContextEnds(t *testing.T) {
	c := start(t, "read x")
	p, err := c.ref.Open()
	require.NoError(t, err)
	defer p.Close()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	killed, err := p.End(ctx, time.Hour)
	require.True(t, killed)
	if err != nil { // the kernel may have been quicker
		require.ErrorIs(t, err, context.Canceled)
	}
	require.ErrorContains(t, c.cmd.Wait(), "killed")
}

func TestAlive(t *testing.T) {
	require.True(t, Alive(os.Getpid()))
	require.False(t, Alive(0))
	c := start(t, "true")
	p, err := c.ref.Open()
	require.NoError(t, err)
	defer p.Close()
	require.NoError(t, p.Wait(t.Context()))
	require.False(t, Alive(c.ref.PID), "a zombie has ended")
	s, err := ReadStat(c.ref.PID)
	require.NoError(t, err)
	require.EqualValues(t, 'Z', s.State)
}

const statTail = " S 1 12 12 0 -1 %FLAGS% 1 2 3 4 5 6 7 8 20 0 1 0 %START% 1000 10"

func TestParseStat(t *testing.T) {
	tail := func(flags, start string) string {
		return strings.NewReplacer("%FLAGS%", flags, "%START%", start).Replace(statTail)
	}
	want := Stat{State: 'S', Flags: 4194560, Start: 77}
	for name, tc := range map[string]struct {
		stat string
		want Stat
		err  bool
	}{
		"plain":           {"12 (x)" + tail("4194560", "77"), want, false},
		"spaces":          {"12 (a b) c)" + tail("4194560", "77"), want, false},
		"another's stat":  {"12 (y) R 1 14 14 0 -1 4194561 1)" + tail("4194560", "77"), want, false},
		"newline":         {"12 (a\nb)" + tail("4194560", "77") + "\n", want, false},
		"empty":           {"", Stat{}, true},
		"no brackets":     {"12 x" + tail("4194560", "77"), Stat{}, true},
		"too short":       {"12 (x) S 1 12", Stat{}, true},
		"bad flags":       {"12 (x)" + tail("-1", "77"), Stat{}, true},
		"bad start":       {"12 (x)" + tail("0", "never"), Stat{}, true},
		"start too large": {"12 (x)" + tail("0", "99999999999999999999"), Stat{}, true},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := parseStat([]byte(tc.stat))
			require.Equal(t, tc.err, err != nil, "%v", err)
			require.Equal(t, tc.want, got)
		})
	}
	require.True(t, Stat{Flags: 0x00208040}.KernelThread())
	require.False(t, want.KernelThread())
	for state, ended := range map[byte]bool{'S': false, 'R': false, 'D': false, 'Z': true, 'X': true} {
		require.Equal(t, ended, Stat{State: state}.Ended(), "%c", state)
	}
}

// A process chooses its name.
func FuzzParseStat(f *testing.F) {
	f.Add("x")
	f.Add(") S (")
	f.Add("a\x00\n)  Z 1")
	f.Fuzz(func(t *testing.T, name string) {
		s, err := parseStat([]byte("12 (" + name + ")" + strings.NewReplacer("%FLAGS%", "64", "%START%", "77").Replace(statTail)))
		if err != nil || s != (Stat{State: 'S', Flags: 64, Start: 77}) {
			t.Fatalf("%q: %+v, %v", name, s, err)
		}
	})
}
