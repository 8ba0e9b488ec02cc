// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/cloister-project/cloister/test/harness"
)

// TestNerdctl runs containers on nerdctl's bridge network, which it sets up by OCI hooks on the host.
func TestNerdctl(t *testing.T) {
	n := sharedNode(t)
	ctx := testContext(t)
	nerdctl := func(args ...string) string { t.Helper(); return succeed(t, n.Nerdctl(ctx, args...)) }
	start := func(name, script string) {
		t.Helper()
		cleanup(t, "removing "+name, func(ctx context.Context) error { return n.Nerdctl(ctx, "rm", "-f", name).Run() })
		nerdctl("run", "-d", "--name", name, "--hostname", name, "--network", n.Name, "--runtime", runtimeName,
			"-e", "WORD=given", harness.BusyboxImage, "sh", "-c", script)
	}
	start("first", "echo hello $WORD; echo oops >&2; while :; do echo first answers | nc -l -p 9000; done & "+idle)
	ip := nerdctl("inspect", "-f", "{{.NetworkSettings.IPAddress}}", "first")
	require.NotNil(t, net.ParseIP(ip), ip)

	t.Run("logs", func(t *testing.T) {
		waitFor(t, ctx, "its output is in the log", func() bool {
			r := run(t, n.Nerdctl(ctx, "logs", "first"))
			return r.stdout == "hello given\n" && r.stderr == "oops\n"
		})
	})
	t.Run("from the node", func(t *testing.T) {
		var got []byte
		waitFor(t, ctx, "the container listens", func() bool {
			conn, err := n.Dial(ctx, "tcp", net.JoinHostPort(ip, "9000"))
			if err != nil {
				return false
			}
			defer conn.Close()
			got, err = io.ReadAll(conn)
			return err == nil && len(got) > 0
		})
		assert.Equal(t, "first answers\n", string(got))
		succeed(t, n.Command(ctx, n.Artifacts().Busybox, "ping", "-c", "1", "-W", "30", ip))
	})
	t.Run("exec", func(t *testing.T) {
		r := run(t, n.Nerdctl(ctx, "exec", "first", "sh", "-c", "hostname; ip addr; echo err >&2; exit 42"))
		assert.NotZero(t, r.status)
		assert.Contains(t, r.stderr, "exit code 42")
		assert.Contains(t, r.stdout, "first\n")
		assert.Contains(t, r.stdout, ip+"/")
		assert.Contains(t, r.stderr, "err\n")
		cmd := n.Nerdctl(ctx, "exec", "-i", "first", "cat")
		cmd.Stdin = strings.NewReader("through stdin\n")
		assert.Equal(t, "through stdin", succeed(t, cmd))
	})
	t.Run("to the node and by name", func(t *testing.T) {
		nerdctl("exec", "first", "ping", "-c", "1", "-W", "30", "10.88.0.1")
		assert.Contains(t, nerdctl("exec", "first", "cat", "/etc/hosts"), ip)
		assert.Contains(t, nerdctl("exec", "first", "cat", "/etc/resolv.conf"), "nameserver")
		// The second one finds the first by the name that nerdctl put into its hosts file.
		got := succeed(t, n.Nerdctl(ctx, "run", "--rm", "--network", n.Name, "--runtime", runtimeName,
			harness.BusyboxImage, "sh", "-c", "until nc first 9000 < /dev/null; do usleep 20000; done"))
		assert.Equal(t, "first answers", got)
	})
	t.Run("a second VM cannot join its network", func(t *testing.T) {
		r := run(t, n.Nerdctl(ctx, "run", "--rm", "--network", "container:first", "--runtime", runtimeName, harness.BusyboxImage, "true"))
		assert.NotZero(t, r.status)
		assert.Contains(t, r.stderr, "put the containers into one pod")
		// The refused one has taken nothing of the first's along.
		nerdctl("exec", "first", "ping", "-c", "1", "-W", "30", "10.88.0.1")
		succeed(t, n.Command(ctx, n.Artifacts().Busybox, "ping", "-c", "1", "-W", "30", ip))
	})
	t.Run("copies do not reach the host", func(t *testing.T) {
		// nerdctl takes /proc/PID/root for the container's root filesystem.
		file := filepath.Join(t.TempDir(), "file")
		require.NoError(t, os.WriteFile(file, []byte("x"), 0o600))
		for _, args := range [][]string{{"cp", file, "first:/copied-by-nerdctl"}, {"cp", file, "first:/tmp/copied-by-nerdctl"},
			{"cp", "first:/etc/hostname", filepath.Dir(file)}} {
			assert.NotZero(t, run(t, n.Nerdctl(ctx, args...)).status, args)
		}
		assert.NoFileExists(t, "/copied-by-nerdctl")
		assert.NoFileExists(t, "/tmp/copied-by-nerdctl")
		assert.NoFileExists(t, filepath.Join(filepath.Dir(file), "hostname"))
	})
	t.Run("sysctls", func(t *testing.T) {
		got := nerdctl("run", "--rm", "--network", n.Name, "--runtime", runtimeName, "--sysctl", "net.core.somaxconn=77",
			"--sysctl", "kernel.shmmni=78", harness.BusyboxImage, "cat", "/proc/sys/net/core/somaxconn", "/proc/sys/kernel/shmmni")
		assert.Equal(t, "77\n78", got)
		r := run(t, n.Nerdctl(ctx, "run", "--rm", "--network", n.Name, "--runtime", runtimeName, "--sysctl", "vm.swappiness=1",
			harness.BusyboxImage, "true"))
		assert.NotZero(t, r.status)
		assert.Contains(t, r.stderr, "not in a VM: sysctl vm.swappiness: leave it out")
	})
	t.Run("stop and rm", func(t *testing.T) {
		nerdctl("stop", "first")
		assert.Contains(t, nerdctl("ps", "-a", "--filter", "name=first"), "Exited (0)")
		nerdctl("rm", "first")
		assert.NotContains(t, nerdctl("ps", "-a"), "first")
	})
}
