// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sync/errgroup"

	"github.com/cloister-project/cloister/test/harness"
)

const (
	bulkSize  = 20 << 20 // through stdin and out again
	burstSize = 8 << 20  // written by a process that exits at once
)

// checkStdio is about the bytes of processes: those of execs over FIFOs of the test's own, those of inits over CRI's log.
func checkStdio(t *testing.T, n *harness.Node, pod *harness.Pod) {
	c := runContainer(t, pod, harness.ContainerSpec{})

	t.Run("20 MiB in and out", func(t *testing.T) { checkBulk(t, n, c) })
	t.Run("burst of an exec", func(t *testing.T) { checkExecBurst(t, n, c) })
	t.Run("burst of an init", func(t *testing.T) { checkInitBurst(t, pod) })
	t.Run("stdin detached and attached again", func(t *testing.T) { checkReattach(t, n, c) })
	t.Run("end of input", func(t *testing.T) { checkEndOfInput(t, n, c) })
	t.Run("output held open by a child", func(t *testing.T) { checkBackground(t, n, c) })
	t.Run("terminal", func(t *testing.T) { checkTerminal(t, n, c) })
	t.Run("terminal sized before start", func(t *testing.T) { checkEarlyResize(t, n, c) })
	t.Run("exec of crictl", func(t *testing.T) { checkCrictlExec(t, n, c) })
	t.Run("20 execs at once", func(t *testing.T) { checkManyExecs(t, c) })
	t.Run("long output of an exec", func(t *testing.T) { checkLongOutput(t, c) })
}

func randomBytes(n int) []byte {
	b := make([]byte, n)
	_, _ = rand.Read(b) // never fails
	return b
}

func sum(b []byte) string {
	s := sha256.Sum256(b)
	return hex.EncodeToString(s[:])
}

func checkBulk(t *testing.T, n *harness.Node, c *harness.Container) {
	// The guest's own sum of what it got goes out on stderr.
	p := newProcess(t, n, c.ID, processSpec{script: "mkfifo /tmp/sum && { sha256sum < /tmp/sum >&2 & } && tee /tmp/sum; wait; rm /tmp/sum"})
	data := randomBytes(bulkSize)
	var feed errgroup.Group
	feed.Go(func() error {
		_, err := p.stdin.Write(data)
		return err
	})
	require.NoError(t, feed.Wait())
	p.closeStdin()
	stdout, stderr, status := p.finished()
	assert.Zero(t, status)
	assert.Equal(t, sum(data)+"  -\n", string(stderr), "what the guest got")
	assert.Len(t, stdout, bulkSize)
	assert.Equal(t, sum(data), sum(stdout), "what came back")
}

func checkExecBurst(t *testing.T, n *harness.Node, c *harness.Container) {
	output(t, c, fmt.Sprintf("head -c %d /dev/urandom > /tmp/burst", burstSize))
	want := strings.Fields(output(t, c, "sha256sum /tmp/burst"))[0]
	p := newProcess(t, n, c.ID, processSpec{script: "exec cat /tmp/burst"})
	stdout, _, status := p.finished()
	assert.Zero(t, status)
	assert.Len(t, stdout, burstSize)
	assert.Equal(t, want, sum(stdout))
	output(t, c, "rm /tmp/burst")
}

// checkInitBurst looks for the burst in CRI's log as soon as the container is said to have exited.
func checkInitBurst(t *testing.T, pod *harness.Pod) {
	status, stdout, stderr := ended(t, pod, harness.ContainerSpec{
		// Lines of text, 8 MiB of them: CRI's log is by line.
		Script: "head -c 6300000 /dev/urandom | base64 > /tmp/burst; sha256sum < /tmp/burst >&2; exec cat /tmp/burst",
	})
	assert.Zero(t, status.GetExitCode())
	assert.GreaterOrEqual(t, len(stdout), burstSize)
	assert.Equal(t, stderr, sum([]byte(stdout))+"  -\n")
}

// checkReattach closes stdin's last writer and opens it again: nothing is lost, and it is no end of input.
func checkReattach(t *testing.T, n *harness.Node, c *harness.Container) {
	p := newProcess(t, n, c.ID, processSpec{script: "while read -r line; do echo got $line; done; echo end"})
	for _, word := range []string{"one", "two", "three"} {
		p.write([]byte(word + "\n"))
		p.detach()
		p.attach()
	}
	p.closeStdin()
	stdout, _, status := p.finished()
	assert.Zero(t, status)
	assert.Equal(t, "got one\ngot two\ngot three\nend\n", string(stdout))
}

func checkEndOfInput(t *testing.T, n *harness.Node, c *harness.Container) {
	p := newProcess(t, n, c.ID, processSpec{script: "cat; echo end; exit 42"})
	p.write([]byte("last words\n"))
	p.closeStdin()
	p.closeStdin() // may be repeated
	stdout, stderr, status := p.finished()
	assert.Equal(t, "last words\nend\n", string(stdout))
	assert.Empty(t, stderr)
	assert.EqualValues(t, 42, status)
}

// checkBackground: a child in the background that keeps the output open does not delay the exit, and what it writes
// later still comes.
func checkBackground(t *testing.T, n *harness.Node, c *harness.Container) {
	p := newProcess(t, n, c.ID, processSpec{script: "{ while [ ! -e /tmp/go ]; do usleep 20000; done; echo late; } & echo early; exit 7"})
	assert.EqualValues(t, 7, p.wait())
	output(t, c, "touch /tmp/go")
	assert.Equal(t, "early\nlate\n", string(p.all("stdout", p.out)))
	output(t, c, "rm /tmp/go")
}

func checkTerminal(t *testing.T, n *harness.Node, c *harness.Container) {
	p := newProcess(t, n, c.ID, processSpec{
		terminal: true,
		script: "tty; until [ \"$(stty size 2>/dev/null)\" = '45 123' ]; do usleep 20000; done; touch /tmp/sized; " +
			"read -r a; echo \"[$a]\"; echo err >&2; read -r a || echo end; exit 5",
	})
	p.resize(123, 45)
	awaitSized(t, c)
	p.write([]byte("typed\n"))
	p.write([]byte{4}) // Ctrl-D: a terminal's end of input
	stdout, _, status := p.finished()
	assert.EqualValues(t, 5, status)
	lines := strings.Split(strings.TrimSuffix(string(stdout), "\r\n"), "\r\n")
	require.Len(t, lines, 5, "%q", stdout)
	assert.Regexp(t, `^/dev/(pts/\d+|console)$`, lines[0])
	// The terminal echoes what is typed.
	assert.Equal(t, []string{"typed", "[typed]", "err", "end"}, lines[1:])
}

// awaitSized waits until a script has made /tmp/sized. What is typed before a script's first lines are out can be echoed
// in the midst of one: the kernel's terminal writes the end of a line on its own.
func awaitSized(t *testing.T, c *harness.Container) {
	t.Helper()
	output(t, c, "until [ -e /tmp/sized ]; do usleep 20000; done; rm /tmp/sized")
}

func checkEarlyResize(t *testing.T, n *harness.Node, c *harness.Container) {
	p := newProcess(t, n, c.ID, processSpec{
		terminal: true, script: "stty size; touch /tmp/sized; read -r a; echo \"[$a]\"; echo err >&2",
		beforeStart: func(p *process) { p.resize(100, 30) },
	})
	awaitSized(t, c)
	p.write([]byte("typed\n"))
	stdout, _, status := p.finished()
	assert.Zero(t, status)
	assert.Equal(t, "30 100\r\ntyped\r\n[typed]\r\nerr\r\n", string(stdout))
}

func checkCrictlExec(t *testing.T, n *harness.Node, c *harness.Container) {
	cmd := n.Crictl(testContext(t), "exec", "-i", c.ID, "sh", "-c", "cat; echo err >&2; exit 3")
	cmd.Stdin = strings.NewReader("through kubelet's way\n")
	r := run(t, cmd)
	assert.Equal(t, "through kubelet's way\n", r.stdout)
	assert.Contains(t, r.stderr, "err\n")
	assert.NotZero(t, r.status)
}

func checkManyExecs(t *testing.T, c *harness.Container) {
	ctx := testContext(t)
	var all errgroup.Group
	for i := range 20 {
		all.Go(func() error {
			want := harness.ExecResult{Stdout: fmt.Sprintf("out %d\n", i), Stderr: fmt.Sprintf("err %d\n", i), ExitCode: int32(i)}
			got, err := c.Exec(ctx, "sh", "-c", fmt.Sprintf("echo out %d; echo err %d >&2; exit %d", i, i, i))
			if err == nil && got != want {
				err = fmt.Errorf("got %+v, want %+v", got, want)
			}
			return err
		})
	}
	require.NoError(t, all.Wait())
}

func checkLongOutput(t *testing.T, c *harness.Container) {
	result, err := c.Exec(testContext(t), "seq", "1", "200000")
	require.NoError(t, err)
	assert.Zero(t, result.ExitCode)
	var want strings.Builder
	for i := 1; i <= 200000; i++ {
		fmt.Fprintln(&want, i)
	}
	assert.Equal(t, sum([]byte(want.String())), sum([]byte(result.Stdout)), "%d bytes, want %d", len(result.Stdout), want.Len())
}
