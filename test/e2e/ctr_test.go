// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/containerd/api/services/tasks/v1"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/opencontainers/runtime-spec/specs-go"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/cloister-project/cloister/test/harness"
)

const runtimeName = "io.containerd.cloister.v2"

// ctrRun is `ctr run` with Cloister.
func ctrRun(n *harness.Node, args ...string) []string {
	return append([]string{"run", "--runtime", runtimeName, "--runtime-config-path", n.CloisterConfig}, args...)
}

// TestCtr runs single containers, each with a VM of its own, as `ctr run` does.
func TestCtr(t *testing.T) {
	n := sharedNode(t)
	t.Run("20 MiB, overlayfs", func(t *testing.T) { checkCtrBulk(t, n, "overlayfs") })
	t.Run("20 MiB, erofs", func(t *testing.T) { checkCtrBulk(t, n, "erofs") })
	t.Run("terminal", func(t *testing.T) { checkCtrTerminal(t, n) })
	t.Run("little input", func(t *testing.T) {
		// It ends long before the container can start.
		cmd := n.Ctr(testContext(t), ctrRun(n, "--rm", harness.BusyboxImage, "little", "cat")...)
		cmd.Stdin = strings.NewReader("little\n")
		assert.Equal(t, "little", succeed(t, cmd))
	})
	t.Run("detached", func(t *testing.T) { checkCtrDetached(t, n) })
	t.Run("root and namespaces that are not its own", func(t *testing.T) { checkCtrHost(t, n) })
}

// checkCtrHost runs a container whose root is a directory of the host, and whose specification leaves namespaces out.
func checkCtrHost(t *testing.T, n *harness.Node) {
	ctx := testContext(t)
	root := filepath.Join(t.TempDir(), "root")
	for _, dir := range []string{"bin", "etc", "proc", "dev", "sys", "run", "tmp"} {
		require.NoError(t, os.MkdirAll(filepath.Join(root, dir), 0o755))
	}
	busybox, err := os.ReadFile(n.Artifacts().Busybox)
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(filepath.Join(root, "bin/busybox"), busybox, 0o755))
	require.NoError(t, os.Symlink("busybox", filepath.Join(root, "bin/sh")))
	require.NoError(t, os.WriteFile(filepath.Join(root, "etc/theirs"), []byte("x"), 0o640))
	require.NoError(t, os.Chown(filepath.Join(root, "etc/theirs"), 7, 8))

	const id = "of-the-host"
	removeAfter(t, n, id)
	succeed(t, n.Ctr(ctx, "container", "create", "--runtime", runtimeName, "--runtime-config-path", n.CloisterConfig, "--rootfs",
		"--hostname", "of-the-pod", root, id, "/bin/sh", "-c", `PATH=/bin; b=busybox
$b stat -c %u:%g:%a /etc/theirs; echo x > /etc/made; $b cat /etc/made; $b hostname
[ $($b ls /proc | $b grep -c '^[0-9]') -lt 10 ] && echo no kernel threads; $b kill -9 1; echo alive`))
	changeSpec(t, n, id, func(s *specs.Spec) {
		s.Linux.Namespaces = slices.DeleteFunc(s.Linux.Namespaces, func(ns specs.LinuxNamespace) bool {
			return ns.Type == specs.PIDNamespace || ns.Type == specs.IPCNamespace || ns.Type == specs.UTSNamespace
		})
	})
	said := succeed(t, n.Ctr(ctx, "task", "start", id))
	assert.Equal(t, "7:8:640\nx\n(none)\nno kernel threads\nalive", said, "neither the pod's name nor the agent")
	assert.NoFileExists(t, filepath.Join(root, "etc/made"), "it is a copy")

	started := time.Now()
	missing := run(t, n.Ctr(ctx, ctrRun(n, "--rm", "--net-host", harness.BusyboxImage, "net-host", "true")...))
	assert.NotZero(t, missing.status)
	requireContains(t, missing.stderr, "network")
	t.Logf("refused after %s", time.Since(started))
}

// checkCtrBulk sends 20 MiB through a container's stdin and gets them back on stdout, its words on stderr, its status.
func checkCtrBulk(t *testing.T, n *harness.Node, snapshotter string) {
	data := randomBytes(bulkSize)
	cmd := n.Ctr(testContext(t), ctrRun(n, "--rm", "--snapshotter", snapshotter, harness.BusyboxImage, "bulk-"+snapshotter,
		"sh", "-c", "cat && echo end of input >&2; exit 42")...)
	cmd.Stdin = bytes.NewReader(data)
	r := run(t, cmd)
	assert.Equal(t, 42, r.status)
	assert.Equal(t, "end of input\n", r.stderr)
	assert.Len(t, r.stdout, bulkSize)
	assert.Equal(t, sum(data), sum([]byte(r.stdout)))
}

// terminal is a pseudo terminal; what comes out of it is gathered.
type terminal struct {
	master, slave *os.File

	mu  sync.Mutex
	out bytes.Buffer
}

func newTerminal(t *testing.T) *terminal {
	t.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY|unix.O_NONBLOCK, 0)
	require.NoError(t, err)
	t.Cleanup(func() { _ = master.Close() })
	require.NoError(t, unix.IoctlSetPointerInt(int(fd(t, master)), unix.TIOCSPTLCK, 0))
	number, err := unix.IoctlGetInt(int(fd(t, master)), unix.TIOCGPTN)
	require.NoError(t, err)
	slave, err := os.OpenFile("/dev/pts/"+itoa(int64(number)), os.O_RDWR|unix.O_NOCTTY, 0)
	require.NoError(t, err)
	t.Cleanup(func() { _ = slave.Close() })
	term := &terminal{master: master, slave: slave}
	go func() {
		buf := make([]byte, 4096)
		for {
			n, err := master.Read(buf)
			if err != nil {
				return // closed by the test's end
			}
			term.mu.Lock()
			term.out.Write(buf[:n])
			term.mu.Unlock()
		}
	}()
	return term
}

// fd is the file's descriptor; unlike File.Fd it leaves the file in non-blocking mode.
func fd(t *testing.T, f *os.File) (got uintptr) {
	t.Helper()
	raw, err := f.SyscallConn()
	require.NoError(t, err)
	require.NoError(t, raw.Control(func(fd uintptr) { got = fd }))
	return got
}

func (term *terminal) resize(t *testing.T, columns, rows uint16) {
	t.Helper()
	require.NoError(t, unix.IoctlSetWinsize(int(fd(t, term.master)), unix.TIOCSWINSZ, &unix.Winsize{Col: columns, Row: rows}))
}

func (term *terminal) text() string {
	term.mu.Lock()
	defer term.mu.Unlock()
	return term.out.String()
}

func (term *terminal) expect(t *testing.T, ctx context.Context, text string) {
	t.Helper()
	defer func() {
		if t.Failed() {
			t.Logf("the terminal shows:\n%s", term.text())
		}
	}()
	waitFor(t, ctx, "the terminal shows "+text, func() bool { return strings.Contains(term.text(), text) })
}

// checkCtrTerminal works in a shell as people do.
func checkCtrTerminal(t *testing.T, n *harness.Node) {
	ctx := testContext(t)
	term := newTerminal(t)
	term.resize(t, 111, 22)
	cmd := n.Ctr(ctx, ctrRun(n, "--rm", "-t", harness.BusyboxImage, "terminal", "sh")...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = term.slave, term.slave, term.slave
	cmd.SysProcAttr = &unix.SysProcAttr{Setsid: true, Setctty: true} // so that it hears of the terminal's size
	require.NoError(t, cmd.Start())
	removeAfter(t, n, "terminal")
	enter := func(text string) {
		_, err := term.master.WriteString(text)
		require.NoError(t, err)
	}
	enter("tty; echo from-$((40+2))\n")
	term.expect(t, ctx, "/dev/")
	term.expect(t, ctx, "from-42")
	enter("until [ \"$(stty size)\" = '22 111' ]; do usleep 20000; done; echo first-$((1+1))\n")
	term.expect(t, ctx, "first-2")
	term.resize(t, 99, 33)
	enter("until [ \"$(stty size)\" = '33 99' ]; do usleep 20000; done; echo second-$((1+1))\n")
	term.expect(t, ctx, "second-2")
	enter("sh -c 'echo sleeping-$((1+1)); exec sleep 1000'\n")
	term.expect(t, ctx, "sleeping-2")
	enter("\x03") // Ctrl-C interrupts what runs in the foreground
	enter("echo third-$((1+1))\n")
	term.expect(t, ctx, "third-2")
	enter("exit 5\n")
	_ = cmd.Wait()
	assert.Equal(t, 5, cmd.ProcessState.ExitCode(), term.text())
}

// removeAfter removes a container at the test's end, of which then nothing is left unless the test failed.
func removeAfter(t *testing.T, n *harness.Node, id string) {
	t.Helper()
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), budget)
		defer cancel()
		_ = n.Ctr(ctx, "task", "rm", "-f", id).Run()
		_ = n.Ctr(ctx, "container", "rm", id).Run()
	})
}

// checkCtrDetached does to a container in the background what `ctr task` offers.
func checkCtrDetached(t *testing.T, n *harness.Node) {
	ctx := testContext(t)
	const id = "detached"
	log := filepath.Join(t.TempDir(), "log")
	succeed(t, n.Ctr(ctx, ctrRun(n, "-d", "--log-uri", "file://"+log,
		"--env", "WORD=given", "--cwd", "/tmp", "--hostname", "named", "--rlimit-nofile", "123:456",
		"--mount", "type=tmpfs,src=tmpfs,dst=/scratch,options=size=8m:mode=1777", "--memory-limit", "67108864", "--read-only",
		harness.BusyboxImage, id, "sh", "-c", "echo $WORD; pwd; hostname; ulimit -n; ulimit -H -n; i=0; "+
			"trap 'exit 33' TERM; while :; do i=$((i+1)); echo $i > /scratch/count; usleep 10000; done")...))
	removeAfter(t, n, id)
	read := func() string {
		b, err := os.ReadFile(log)
		require.NoError(t, err)
		return string(b)
	}
	waitFor(t, ctx, "its first lines", func() bool { return strings.Count(read(), "\n") == 5 })
	assert.Equal(t, "given\n/tmp\nnamed\n123\n456\n", read())
	exec := func(execID string, command ...string) []string {
		return append([]string{"task", "exec", "--exec-id", execID, id}, command...)
	}
	count := func() string { return succeed(t, n.Ctr(ctx, exec("count", "cat", "/scratch/count")...)) }

	t.Run("exec", func(t *testing.T) {
		r := run(t, n.Ctr(ctx, exec("one", "sh", "-c", "echo out; echo err >&2; exit 42")...))
		assert.Equal(t, result{"out\n", "err\n", 42}, r)
		r = run(t, n.Ctr(ctx, exec("two", "no-such-command")...))
		assert.NotZero(t, r.status)
		assert.Contains(t, r.stderr, `exec: "no-such-command": executable file not found in $PATH`)
	})
	t.Run("tmpfs", func(t *testing.T) {
		assert.Equal(t, "8192", succeed(t, n.Ctr(ctx, exec("df", "sh", "-c", "df -k /scratch | awk 'NR==2 { print $2 }'")...)))
		r := run(t, n.Ctr(ctx, exec("fill", "sh", "-c", "head -c 9000000 /dev/zero > /scratch/fill; wc -c < /scratch/fill; rm -f "+
			"/scratch/fill; touch /file")...))
		filled, err := strconv.Atoi(strings.TrimSpace(r.stdout))
		require.NoError(t, err)
		assert.LessOrEqual(t, filled, 8<<20)
		assert.Contains(t, r.stderr, "Read-only file system")
	})
	t.Run("ps and ls", func(t *testing.T) {
		assert.NotEmpty(t, succeed(t, n.Ctr(ctx, "task", "ps", id)))
		assert.Regexp(t, id+`\s+\d+\s+RUNNING`, succeed(t, n.Ctr(ctx, "task", "ls")))
	})
	t.Run("metrics", func(t *testing.T) {
		metrics := succeed(t, n.Ctr(ctx, "task", "metrics", id))
		assert.Regexp(t, `memory.usage\s+[1-9]`, metrics)
		assert.Regexp(t, `memory.usage_limit\s+67108864`, metrics)
	})
	t.Run("pause and resume", func(t *testing.T) {
		succeed(t, n.Ctr(ctx, "task", "pause", id))
		assert.Regexp(t, id+`\s+\d+\s+PAUSED`, succeed(t, n.Ctr(ctx, "task", "ls")))
		succeed(t, n.Ctr(ctx, "task", "resume", id))
		assert.Regexp(t, id+`\s+\d+\s+RUNNING`, succeed(t, n.Ctr(ctx, "task", "ls")))
		before := count()
		waitFor(t, ctx, "it counts on", func() bool { return count() != before })
	})
	t.Run("kill and rm", func(t *testing.T) {
		succeed(t, n.Ctr(ctx, "task", "kill", "-s", "SIGTERM", id))
		waitFor(t, ctx, "it has stopped", func() bool { return strings.Contains(succeed(t, n.Ctr(ctx, "task", "ls")), "STOPPED") })
		answer, err := tasksOf(t, n).Get(namespaces.WithNamespace(ctx, n.Name), &tasks.GetRequest{ContainerID: id})
		require.NoError(t, err)
		assert.EqualValues(t, 33, answer.GetProcess().GetExitStatus())
		succeed(t, n.Ctr(ctx, "task", "rm", id))
		succeed(t, n.Ctr(ctx, "container", "rm", id))
	})
}
