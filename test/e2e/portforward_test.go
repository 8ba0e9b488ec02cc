// SPDX-License-Identifier: Apache-2.0

package e2e

import (
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

// checkPortForward reaches ports of a container's loopback by way of containerd, as kubectl does.
func checkPortForward(t *testing.T, n *harness.Node, pod *harness.Pod, c *harness.Container) {
	ctx, cancel := context.WithCancel(testContext(t))
	defer cancel()
	// Bound to loopback alone: nothing but a forward gets there.
	output(t, c, "(while :; do echo on loopback | nc -l -p 7000 -s 127.0.0.1; done) > /dev/null 2>&1 < /dev/null &")
	var said strings.Builder
	forward := n.Crictl(ctx, "port-forward", pod.ID, "17000:7000", "17002:7002")
	forward.Stdout, forward.Stderr = &said, &said
	require.NoError(t, forward.Start())
	defer func() {
		cancel()
		_ = forward.Wait()
		if t.Failed() {
			t.Log(said.String())
		}
	}()
	var got []byte
	waitFor(t, ctx, "the forwarded port answers", func() bool {
		conn, err := n.Dial(ctx, "tcp", "127.0.0.1:17000")
		if err != nil {
			return false
		}
		defer conn.Close()
		got, err = io.ReadAll(conn)
		return err == nil && len(got) > 0
	})
	assert.Equal(t, "on loopback\n", string(got))

	// Nobody listens behind the other port: the connection ends, and the pod does not mind.
	conn, err := n.Dial(ctx, "tcp", "127.0.0.1:17002")
	require.NoError(t, err)
	defer conn.Close()
	got, _ = io.ReadAll(conn)
	assert.Empty(t, got)

	// Much data, and its end, one way.
	output(t, c, "(nc -l -p 7003 -s 127.0.0.1 > /tmp/received; sha256sum < /tmp/received > /tmp/sum) > /dev/null 2>&1 < /dev/null &")
	data := randomBytes(bulkSize)
	send := exec.CommandContext(ctx, "nsenter", "--net="+podNetns(t, n, pod), "--", n.Artifacts().Busybox, "nc", "127.0.0.1", "7003")
	send.Stdin = strings.NewReader(string(data))
	out, err := send.CombinedOutput()
	require.NoError(t, err, string(out))
	digest := sha256.Sum256(data)
	waitFor(t, ctx, "all has arrived", func() bool {
		return strings.HasPrefix(output(t, c, "cat /tmp/sum 2> /dev/null || true"), hex.EncodeToString(digest[:]))
	})
}

// podNetns is the path of the pod's network namespace on the host.
func podNetns(t *testing.T, n *harness.Node, pod *harness.Pod) string {
	t.Helper()
	pids, err := n.Pids("qemu-system")
	require.NoError(t, err)
	require.NotEmpty(t, pids)
	return fmt.Sprintf("/proc/%d/ns/net", pids[0])
}
