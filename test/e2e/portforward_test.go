// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"os/exec"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/cloister-project/cloister/test/harness"
)

// checkPortForward reaches ports of a container by way of containerd, as kubectl does. One of the container's ports answers
// with its name, again and again.
func checkPortForward(t *testing.T, n *harness.Node, pod *harness.Pod, c *harness.Container, port int, answer string) {
	ctx := testContext(t)
	var got, said string
	// crictl gives up when nothing listens for a moment.
	waitFor(t, ctx, "the forwarded port answers", func() bool {
		got, said = forwardOnce(t, n, pod, port)
		return got != ""
	})
	assert.Equal(t, answer+"\n", got)

	// A port where nobody listens; the pod does not mind.
	got, said = forwardOnce(t, n, pod, 7002)
	assert.Empty(t, got)
	assert.Contains(t, said, "connection reset by peer")

	// Much data, and its end, one way, as containerd would send it.
	// Its own input stays open: else it would end its way at once, and the sender with it.
	output(t, c, "(tail -f /dev/null | nc -l -p 7003 > /tmp/received) > /dev/null 2>&1 < /dev/null &")
	waitFor(t, ctx, "the container listens", func() bool { return strings.Contains(output(t, c, "netstat -ltn"), ":7003 ") })
	data := randomBytes(bulkSize)
	send := exec.CommandContext(ctx, "nsenter", "--net="+podNetns(t, n), "--", n.Artifacts().Busybox, "nc", "127.0.0.1", "7003")
	send.Stdin = bytes.NewReader(data)
	out, err := send.CombinedOutput()
	require.NoError(t, err, string(out))
	digest := sha256.Sum256(data)
	waitFor(t, ctx, "all has arrived", func() bool {
		return strings.HasPrefix(output(t, c, "sha256sum /tmp/received"), hex.EncodeToString(digest[:]))
	})
}

// forwardOnce forwards a port of the node to one of the pod, and returns what one connection to it gets, and what crictl says.
func forwardOnce(t *testing.T, n *harness.Node, pod *harness.Pod, port int) (got, said string) {
	t.Helper()
	const local = "127.0.0.1:17000"
	ctx, cancel := context.WithCancel(testContext(t))
	defer cancel()
	var words strings.Builder
	forward := n.Crictl(ctx, "port-forward", pod.ID, fmt.Sprintf("17000:%d", port))
	forward.Stdout, forward.Stderr = &words, &words
	require.NoError(t, forward.Start())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = forward.Wait()
	}()
	waitFor(t, ctx, "crictl listens", func() bool {
		conn, err := n.Dial(ctx, "tcp", local)
		if err != nil {
			return false
		}
		defer conn.Close()
		b, _ := io.ReadAll(conn)
		got = string(b)
		return true
	})
	if got != "" {
		cancel()
	}
	<-ended // by itself where the connection failed
	return got, words.String()
}

// podNetns is the path of the network namespace of the node's only pod.
func podNetns(t *testing.T, n *harness.Node) string {
	t.Helper()
	pids, err := n.Pids("qemu-system")
	require.NoError(t, err)
	require.Len(t, pids, 1)
	return fmt.Sprintf("/proc/%d/ns/net", pids[0])
}
