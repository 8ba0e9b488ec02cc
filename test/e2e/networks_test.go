// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sync/errgroup"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cloister-project/cloister/test/harness"
)

const (
	probePort     = 7000
	probeHostPort = 17000
)

// networks are CNI networks of a bridge: what is in them differs, what pods may expect of them does not.
var networks = []struct {
	name, config string
	// ips are how many addresses a pod has, mtu what its interface has, host the node's address.
	ips, mtu int
	host     string
}{
	{"dual stack with jumbo frames", `"mtu": 9000, "ipam": {"type": "host-local", "dataDir": %q, "ranges": [[{"subnet": "10.89.0.0/24"}],
		[{"subnet": "fd89::/64"}]], "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]}`, 2, 9000, "10.89.0.1"},
	{"IPv6 only", `"ipam": {"type": "host-local", "dataDir": %q, "ranges": [[{"subnet": "fd90::/64"}]], "routes": [{"dst": "::/0"}]}`,
		1, 1500, "fd90::1"},
}

// TestNetworks compares pods with runc's on networks other than the usual one: large frames, one family, ports of the host, datagrams,
// many connections at a time.
func TestNetworks(t *testing.T) {
	handlers := []string{harness.HandlerRunc, harness.HandlerCloister}
	n := harness.ForTest(t, harness.Options{DropIn: os.Getenv("CLOISTER_E2E_DROPIN"), Handlers: handlers})
	image := toolImage(t, n, hostArch(), "netprobe")
	for i, network := range networks {
		t.Run(network.name, func(t *testing.T) {
			useNetwork(t, n, fmt.Sprintf("net%d", i), network.config)
			took := map[string]map[string]time.Duration{}
			for _, handler := range handlers {
				t.Run(handler, func(t *testing.T) {
					took[handler] = checkNetwork(t, n, handler, image, network.ips, network.mtu, network.host)
				})
			}
			for what, with := range took[harness.HandlerCloister] {
				t.Logf("%s: %.1f times as long as with runc (%s)", what, with.Seconds()/took[harness.HandlerRunc][what].Seconds(), with)
			}
		})
	}
}

// useNetwork gives pods another network, until the test ends.
func useNetwork(t *testing.T, n *harness.Node, name, bridge string) {
	t.Helper()
	// The first by name counts.
	path := filepath.Join(n.Dir, "cni", "00-"+name+".conflist")
	text := fmt.Sprintf(`{"cniVersion": "1.0.0", "name": %q, "plugins": [{"type": "bridge", "bridge": %q, "isGateway": true,
		"hairpinMode": true, %s}, {"type": "portmap", "capabilities": {"portMappings": true}}]}`,
		n.Name+name, n.Name+name, fmt.Sprintf(bridge, n.Dir+"/ipam-"+name))
	written := path + ".new"
	require.NoError(t, os.WriteFile(written, []byte(text), 0o600))
	require.NoError(t, os.Rename(written, path))
	cleanup(t, "the network", func(ctx context.Context) error {
		return errors.Join(os.Remove(path), n.Command(ctx, "ip", "link", "delete", n.Name+name).Run())
	})
	waitFor(t, testContext(t), "containerd has read the network", func() bool {
		status, err := n.CRI().Runtime.Status(testContext(t), &runtimeapi.StatusRequest{Verbose: true})
		return err == nil && strings.Contains(status.GetInfo()["cniconfig"], n.Name+name)
	})
}

// checkNetwork uses a pod from the node, and returns how long each part took.
func checkNetwork(t *testing.T, n *harness.Node, handler, image string, ips, mtu int, host string) map[string]time.Duration {
	ctx := testContext(t)
	pod := runPod(t, n, harness.PodSpec{Handler: handler, Change: func(c *runtimeapi.PodSandboxConfig) {
		for _, protocol := range []runtimeapi.Protocol{runtimeapi.Protocol_TCP, runtimeapi.Protocol_UDP} {
			c.PortMappings = append(c.PortMappings,
				&runtimeapi.PortMapping{Protocol: protocol, ContainerPort: probePort, HostPort: probeHostPort})
		}
	}})
	status, _, err := pod.Status(ctx)
	require.NoError(t, err)
	addresses := map[string]string{"the pod": net.JoinHostPort(status.GetNetwork().GetIp(), itoa(probePort))}
	for _, more := range status.GetNetwork().GetAdditionalIps() {
		addresses["the pod's other address"] = net.JoinHostPort(more.GetIp(), itoa(probePort))
	}
	require.Len(t, addresses, ips)
	// A port of the host is translated for what comes to one of its addresses.
	hostPort := net.JoinHostPort(host, itoa(probeHostPort))
	addresses["a port of the host"] = hostPort

	c := runContainer(t, pod, harness.ContainerSpec{Image: image, Command: []string{"netprobe", itoa(probePort)}})
	require.NoError(t, c.WaitLog(ctx, "ready\n"))
	assert.Equal(t, itoa(int64(mtu)), output(t, c, "cat /sys/class/net/eth0/mtu"))

	took := map[string]time.Duration{}
	data := randomBytes(8 << 20)
	for where, address := range addresses {
		took["8 MiB by TCP to "+where] = measure(func() {
			got, err := exchange(ctx, n, address, data)
			require.NoError(t, err, address)
			assert.Equal(t, sum(data), sum(got), address)
		})
		took["300 datagrams to "+where] = measure(func() { checkDatagrams(t, n, address, mtu) })
	}
	took["200 connections, 20 at a time"] = measure(func() {
		g, _ := errgroup.WithContext(ctx)
		g.SetLimit(20)
		for i := range 200 {
			g.Go(func() error {
				word := fmt.Sprintf("connection %d", i)
				got, err := exchange(ctx, n, hostPort, []byte(word))
				if err == nil && string(got) != word {
					err = fmt.Errorf("%s was answered with %q", word, got)
				}
				return err
			})
		}
		require.NoError(t, g.Wait())
	})
	return took
}

func measure(f func()) time.Duration {
	start := time.Now()
	f()
	return time.Since(start).Round(time.Millisecond)
}

// checkDatagrams sends datagrams of many sizes, as large as fit into a frame and larger, which are fragmented, and waits for each.
func checkDatagrams(t *testing.T, n *harness.Node, address string, mtu int) {
	t.Helper()
	conn, err := n.Dial(testContext(t), "udp", address)
	require.NoError(t, err)
	defer conn.Close()
	buf := make([]byte, 64<<10)
	for i := range 300 {
		want := randomBytes(1 + i*(2*mtu)/300)
		answered := false
		for range 10 { // a datagram may be lost
			_, err := conn.Write(want)
			require.NoError(t, err)
			_ = conn.SetReadDeadline(time.Now().Add(5 * time.Second))
			for err == nil && !answered {
				var got int
				got, err = conn.Read(buf)
				answered = err == nil && bytes.Equal(want, buf[:got])
			}
			if answered {
				break
			}
		}
		require.True(t, answered, "datagram of %d bytes", len(want))
	}
}

// exchange sends all of it over a connection and reads what comes back.
func exchange(ctx context.Context, n *harness.Node, address string, data []byte) ([]byte, error) {
	conn, err := n.Dial(ctx, "tcp", address)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	if deadline, ok := ctx.Deadline(); ok {
		_ = conn.SetDeadline(deadline)
	}
	var g errgroup.Group
	g.Go(func() error {
		if _, err := conn.Write(data); err != nil {
			return err
		}
		return conn.(*net.TCPConn).CloseWrite()
	})
	got, err := io.ReadAll(conn)
	if sent := g.Wait(); err == nil {
		err = sent
	}
	return got, err
}
