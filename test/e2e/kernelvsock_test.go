// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"crypto/rand"
	"fmt"
	"os"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/mdlayher/vsock"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/cloister-project/cloister/agent-protocol/wire"
	"github.com/cloister-project/cloister/test/harness"
)

// idleStrangers is more than the agent keeps of connections that have not proved themselves.
const idleStrangers = 200

// TestKernelVsock runs a pod on KVM with the kernel's vsock, network and tap, and connects to its agent as any process of
// the host can: such a stranger gets nothing, and keeps nobody out. `make test-kvm` runs it.
func TestKernelVsock(t *testing.T) {
	for _, device := range []string{"/dev/kvm", "/dev/vhost-vsock", "/dev/vhost-net"} {
		if _, err := os.Stat(device); err != nil {
			t.Skipf("no %s: `make test-kvm` makes a machine that has it", device)
		}
	}
	n := sharedNode(t)
	require.NoError(t, n.WriteDropIn("kernel-vsock", "[hypervisor]\naccel = 'kvm'\nvsock = 'vhost'\n"))
	cleanup(t, "the settings", func(context.Context) error { return n.RemoveDropIn("kernel-vsock") })
	pod := runPod(t, n, harness.PodSpec{})
	c := runContainer(t, pod, harness.ContainerSpec{})
	line := qemuCommandLine(t, n)
	require.Contains(t, line, "-accel kvm -cpu host")
	require.Contains(t, line, "vhost=on", "the network is the kernel's")
	found := regexp.MustCompile(`vhost-vsock-pci.*guest-cid=(\d+)`).FindStringSubmatch(line)
	require.Len(t, found, 2, line)
	number, err := strconv.ParseUint(found[1], 10, 32)
	require.NoError(t, err)
	cid := uint32(number)

	t.Run("strangers get nothing", func(t *testing.T) {
		for _, port := range []uint32{wire.RPCPort, wire.StreamPort} {
			conn := dialGuest(t, cid, port)
			guess := make([]byte, wire.TokenLen+wire.StreamIDLen)
			_, _ = rand.Read(guess)
			_, err := conn.Write(guess)
			require.NoError(t, err)
			got, err := conn.Read(make([]byte, 1))
			assert.Zero(t, got)
			assert.Error(t, err, "port %d answers a stranger", port)
			assert.NotErrorIs(t, err, os.ErrDeadlineExceeded, "port %d keeps a stranger", port)
		}
	})
	t.Run("idle strangers keep nobody out", func(t *testing.T) {
		for i := range idleStrangers {
			dialGuest(t, cid, []uint32{wire.RPCPort, wire.StreamPort}[i%2])
		}
		assert.Equal(t, "still here", execOutput(t, c, "echo", "still here"))
	})
	t.Run("its own network", func(t *testing.T) {
		assert.Contains(t, execOutput(t, c, "sh", "-c", "ip -o addr show dev eth0"), "10.88.")
	})
	t.Run("kvm-clock", func(t *testing.T) {
		assert.Contains(t, execOutput(t, c, "cat", "/sys/devices/system/clocksource/clocksource0/available_clocksource"), "kvm-clock")
	})
}

// execOutput is what a command in a container prints.
func execOutput(t *testing.T, c *harness.Container, command ...string) string {
	t.Helper()
	out, err := c.Output(testContext(t), command...)
	require.NoError(t, err)
	return out
}

// dialGuest connects as any process of the host can; the connection ends with the test.
func dialGuest(t *testing.T, cid, port uint32) *vsock.Conn {
	t.Helper()
	conn, err := vsock.DialContext(testContext(t), cid, port, nil)
	require.NoError(t, err, fmt.Sprintf("port %d of guest %d", port, cid))
	t.Cleanup(func() { _ = conn.Close() })
	require.NoError(t, conn.SetDeadline(time.Now().Add(budget)))
	return conn
}

// qemuCommandLine is that of the node's one QEMU.
func qemuCommandLine(t *testing.T, n *harness.Node) string {
	t.Helper()
	pids, err := n.Pids("qemu-system")
	require.NoError(t, err)
	require.Len(t, pids, 1)
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pids[0]))
	require.NoError(t, err)
	return strings.ReplaceAll(string(raw), "\x00", " ")
}
