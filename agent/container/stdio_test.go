// SPDX-License-Identifier: Apache-2.0

package container

import (
	"crypto/sha256"
	"fmt"
	"io"
	"math/rand"
	"net"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	agentv1 "github.com/cloister-project/cloister/agent-protocol/v1"
	"github.com/cloister-project/cloister/agent-protocol/wire"
)

func TestBurstArrivesWhole(t *testing.T) {
	b := newBench(t, false)
	b.run("c", testSpec(script("sleep 1000")), nil)
	const size = 8 << 20
	for i := range 3 {
		out := b.stream()
		id := fmt.Sprintf("e%d", i)
		got := make(chan int64, 1)
		go func() {
			n, _ := io.Copy(io.Discard, out)
			got <- n
		}()
		require.NoError(t, b.exec("c", id, script("head -c 8388608 /dev/zero"), &agentv1.Stdio{Stdout: out.id.String()}))
		r := b.wait("c", id)
		require.Zero(t, r.GetExitStatus())
		require.EqualValues(t, size, r.GetStdoutBytes())
		require.EqualValues(t, size, <-got)
	}
	b.remove("c")
}

func TestThroughStdinAndOut(t *testing.T) {
	b := newBench(t, false)
	data := make([]byte, 20<<20)
	rand.New(rand.NewSource(1)).Read(data)
	in, out := b.stream(), b.stream()
	sum := make(chan [32]byte, 1)
	go func() {
		h := sha256.New()
		_, _ = io.Copy(h, out)
		sum <- [32]byte(h.Sum(nil))
	}()
	b.run("c", testSpec(script("cat")), &agentv1.Stdio{Stdin: in.id.String(), Stdout: out.id.String()})
	_, err := in.Write(data)
	require.NoError(t, err)
	require.NoError(t, in.CloseWrite())
	r := b.wait("c", "")
	require.Zero(t, r.GetExitStatus())
	require.EqualValues(t, len(data), r.GetStdoutBytes())
	require.Equal(t, sha256.Sum256(data), <-sum)
	b.remove("c")
}

// A child in the background keeps the stream, but not the exit.
func TestBackgroundChild(t *testing.T) {
	b := newBench(t, false)
	b.run("c", testSpec(script("sleep 1000")), nil)
	in, out := b.stream(), b.stream()
	require.NoError(t, b.exec("c", "f", script("echo early; (sleep 1; echo late) & exit 4"),
		&agentv1.Stdio{Stdin: in.id.String(), Stdout: out.id.String()}))
	r := b.wait("c", "f")
	require.EqualValues(t, 4, r.GetExitStatus())
	require.EqualValues(t, len("early\n"), r.GetStdoutBytes())
	require.Equal(t, "early\nlate\n", out.all(t))
	b.remove("c")
}

// Nor does one that never stops to write.
func TestBackgroundChildThatWritesForEver(t *testing.T) {
	for _, terminal := range []bool{false, true} {
		t.Run(fmt.Sprintf("terminal=%t", terminal), func(t *testing.T) {
			b := newBench(t, false)
			b.run("c", testSpec(script("sleep 1000")), nil)
			out := b.stream()
			go func() { _, _ = io.Copy(io.Discard, out) }()
			p := script("trap '' HUP; yes & sleep 0.3; exit 8")
			p.Terminal = terminal
			require.NoError(t, b.exec("c", "e", p, &agentv1.Stdio{Stdout: out.id.String(), Terminal: terminal}))
			r := b.wait("c", "e")
			require.EqualValues(t, 8, r.GetExitStatus())
			require.NotZero(t, r.GetStdoutBytes())
			b.remove("c")
		})
	}
}

// A host that does not read must not keep the exit for ever.
func TestStalledHost(t *testing.T) {
	b := newBench(t, false)
	b.run("c", testSpec(script("sleep 1000")), nil)
	out := b.stream()
	require.NoError(t, b.m.CreateProcess(ctx(t), &agentv1.CreateProcessRequest{
		ContainerId: "c", ExecId: "e", Process: []byte(`{"args":["/bin/yes"],"cwd":"/"}`), Stdio: &agentv1.Stdio{Stdout: out.id.String()},
	}))
	p, err := b.m.process("c", "e")
	require.NoError(t, err)
	p.io.stall = 300 * time.Millisecond
	_, err = b.m.Start(ctx(t), "c", "e")
	require.NoError(t, err)
	buf := make([]byte, 2)
	_, err = io.ReadFull(out, buf)
	require.NoError(t, err)
	var last uint64
	require.Eventually(t, func() bool { // until the stream is full
		now := p.io.out.read.Load()
		full := now == last && now > 0
		last = now
		return full
	}, 30*time.Second, 100*time.Millisecond)
	require.NoError(t, b.m.Signal("c", "e", uint32(unix.SIGKILL), false))
	r := b.wait("c", "e")
	require.EqualValues(t, 137, r.GetExitStatus())
	require.NotZero(t, r.GetStdoutBytes())
	_, err = b.m.Delete(ctx(t), "c", "e")
	require.NoError(t, err)
	b.remove("c")
}

// A host that goes away must not stop the process.
func TestBrokenStream(t *testing.T) {
	b := newBench(t, false)
	out := b.stream()
	b.run("c", testSpec(script("head -c 4194304 /dev/zero; exit 9")), &agentv1.Stdio{Stdout: out.id.String()})
	require.NoError(t, out.Close())
	r := b.wait("c", "")
	require.EqualValues(t, 9, r.GetExitStatus())
	require.EqualValues(t, 4<<20, r.GetStdoutBytes())
	b.remove("c")
}

// A process that does not read its stdin ends nevertheless, and the host's write fails instead of waiting.
func TestStdinThatNobodyReads(t *testing.T) {
	b := newBench(t, false)
	in := b.stream()
	b.run("c", testSpec(script("exec 0<&-; sleep 0.2; exit 6")), &agentv1.Stdio{Stdin: in.id.String()})
	require.NoError(t, in.SetWriteDeadline(time.Now().Add(30*time.Second)))
	_, err := in.Write(make([]byte, 8<<20))
	require.Error(t, err)
	require.NotErrorIs(t, err, os.ErrDeadlineExceeded)
	require.EqualValues(t, 6, b.wait("c", "").GetExitStatus())
	b.remove("c")
}

func TestTerminal(t *testing.T) {
	b := newBench(t, false)
	for _, id := range []string{"", "e"} {
		t.Run("exec="+id, func(t *testing.T) {
			in, out := b.stream(), b.stream()
			p := script("stty size; read x; echo got $x; stty size; read y; sleep 0.1; echo end; exit 2")
			p.Terminal = true
			stdio := &agentv1.Stdio{Stdin: in.id.String(), Stdout: out.id.String(), Terminal: true, Width: 100, Height: 30}
			cid := "c"
			if id == "" {
				require.NoError(t, b.create(cid, testSpec(p), stdio))
				require.NoError(t, b.m.Resize(cid, id, 101, 31))
				_, err := b.m.Start(ctx(t), cid, "")
				require.NoError(t, err)
			} else {
				cid = "d"
				b.run(cid, testSpec(script("sleep 1000")), nil)
				require.NoError(t, b.m.CreateProcess(ctx(t), &agentv1.CreateProcessRequest{
					ContainerId: cid, ExecId: id, Process: []byte(`{"terminal":true,"args":["/bin/sh","-c","` + p.Args[2] +
						`"],"cwd":"/","env":["PATH=/bin"]}`), Stdio: stdio,
				}))
				require.NoError(t, b.m.Resize(cid, id, 101, 31))
				_, err := b.m.Start(ctx(t), cid, id)
				require.NoError(t, err)
			}
			require.Contains(t, out.until(t, "31 101\r\n"), "31 101")
			require.NoError(t, b.m.Resize(cid, id, 80, 24))
			_, err := in.Write([]byte("text\n"))
			require.NoError(t, err)
			out.until(t, "got text\r\n")
			out.until(t, "24 80\r\n")
			// The end of the stream is not the end of the terminal's input; ^D is.
			_, err = in.Write([]byte{4})
			require.NoError(t, err)
			require.NoError(t, in.CloseWrite())
			require.Contains(t, out.all(t), "end\r\n")
			require.EqualValues(t, 2, b.wait(cid, id).GetExitStatus())
			b.remove(cid)
		})
	}
}

func TestTerminalThatNobodyReads(t *testing.T) {
	b := newBench(t, false)
	p := script("head -c 1000000 /dev/zero; exit 1")
	p.Terminal = true
	b.run("c", testSpec(p), &agentv1.Stdio{Terminal: true})
	require.EqualValues(t, 1, b.wait("c", "").GetExitStatus())
	b.remove("c")
}

func TestStreamsMustBeConnected(t *testing.T) {
	b := newBench(t, false)
	id := wire.NewStreamID()
	stdio := &agentv1.Stdio{Stdout: id.String()}
	require.NoError(t, b.create("c", testSpec(script("echo hi")), stdio))
	_, err := b.m.Start(ctx(t), "c", "")
	require.ErrorContains(t, err, "is not connected")
	require.ErrorContains(t, b.create("d", testSpec(script("echo hi")), stdio), "belongs to another stream")
	b.gone("d")
	ours, theirs := socketPair(t)
	require.NoError(t, b.streams.Offer(id, theirs))
	_, err = b.m.Start(ctx(t), "c", "")
	require.NoError(t, err)
	got, err := io.ReadAll(ours)
	require.NoError(t, err)
	require.Equal(t, "hi\n", string(got))
	b.wait("c", "")
	b.remove("c")
}

func socketPair(t *testing.T) (ours, theirs net.Conn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	require.NoError(t, err)
	for i, c := range []*net.Conn{&ours, &theirs} {
		f := os.NewFile(uintptr(fds[i]), "pair")
		*c, err = net.FileConn(f)
		require.NoError(t, err)
		require.NoError(t, f.Close())
	}
	t.Cleanup(func() { _ = ours.Close() })
	return ours, theirs
}

func TestStreamsRegistry(t *testing.T) {
	s := NewStreams()
	s.patience = 20 * time.Millisecond
	id := wire.NewStreamID()
	ours, theirs := socketPair(t)
	require.NoError(t, s.Offer(id, theirs))
	require.Error(t, s.Offer(id, theirs), "an id twice")
	_, err := ours.Read(make([]byte, 1))
	require.ErrorIs(t, err, io.EOF, "nobody names it: it is closed")

	s.patience = time.Hour
	for i := range wire.MaxPendingStreams {
		_, theirs := net.Pipe()
		require.NoError(t, s.Offer(wire.NewStreamID(), theirs), i)
	}
	_, extra := net.Pipe()
	require.ErrorContains(t, s.Offer(wire.NewStreamID(), extra), "no process has named")
	require.NoError(t, s.expect([]wire.StreamID{id}))
	require.NoError(t, s.Offer(id, extra), "a stream that is expected does not count")
	require.Error(t, s.expect([]wire.StreamID{id}))
	_, err = s.take([]wire.StreamID{id})
	require.NoError(t, err)
	require.Error(t, s.Offer(id, extra), "taken")
	s.forget([]wire.StreamID{id})
	require.Error(t, s.expect([]wire.StreamID{id, id}))
	s.Close()
	require.Error(t, s.Offer(id, extra))
}

func TestParseStdio(t *testing.T) {
	a, b := wire.NewStreamID().String(), wire.NewStreamID().String()
	for _, bad := range []*agentv1.Stdio{
		{Stdin: "x"}, {Stdout: strings.Repeat("G", 32)}, {Stderr: a + b}, {Terminal: true, Stderr: a}, {Terminal: true, Width: 70000},
	} {
		_, err := parseStdio(bad)
		require.Error(t, err, "%v", bad)
	}
	s, err := parseStdio(&agentv1.Stdio{Stdin: a, Stderr: b})
	require.NoError(t, err)
	require.Len(t, s.ids(), 2)
	_, err = parseStdio(nil)
	require.NoError(t, err)
}

// Nothing is left of a pod: no goroutine, no descriptor.
func TestNothingIsLeft(t *testing.T) {
	pod := func(t *testing.T) {
		b := newBench(t, true)
		in, out := b.stream(), b.stream()
		b.run("c", testSpec(script("cat; sleep 1000"), sharePID(true)), &agentv1.Stdio{Stdin: in.id.String(), Stdout: out.id.String()})
		p := script("sleep 1000")
		p.Terminal = true
		require.NoError(t, b.exec("c", "e", p, &agentv1.Stdio{Terminal: true}))
		require.Error(t, b.exec("c", "f", &specs.Process{Args: []string{"nosuch"}, Cwd: "/"}, nil))
		require.NoError(t, b.create("d", testSpec(script("true"), sharePID(true)), nil))
		require.NoError(t, b.m.Signal("d", "", uint32(unix.SIGKILL), false))
		_, err := b.m.Start(ctx(t), "d", "")
		require.Error(t, err)
		b.remove("d")
		b.remove("c")
	}
	t.Run("first", pod) // libcontainer keeps a descriptor of /proc for ever
	before, goroutines := descriptors(t), goleak.IgnoreCurrent()
	for range 3 {
		t.Run("again", pod)
	}
	goleak.VerifyNone(t, goroutines)
	require.Equal(t, before, descriptors(t))
}

func descriptors(t *testing.T) []string {
	t.Helper()
	list, err := os.ReadDir("/proc/self/fd")
	require.NoError(t, err)
	var out []string
	for _, e := range list {
		to, err := os.Readlink("/proc/self/fd/" + e.Name())
		if err == nil {
			out = append(out, to)
		}
	}
	slices.Sort(out)
	return out
}
