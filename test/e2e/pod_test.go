// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"io"
	"net"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sync/errgroup"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cloister-project/cloister/test/harness"
)

// TestPod is about everything of containers that can share a pod, theme by theme: -run TestPod/stdio.
func TestPod(t *testing.T) {
	n := sharedNode(t)
	pod := runPod(t, n, harness.PodSpec{})
	t.Run("stdio", func(t *testing.T) { checkStdio(t, n, pod) })
	t.Run("exit codes", func(t *testing.T) { checkExitCodes(t, pod) })
	t.Run("security", func(t *testing.T) { checkSecurity(t, n, pod) })
	t.Run("resources", func(t *testing.T) { checkResources(t, n, pod) })
	t.Run("mounts", func(t *testing.T) { checkMounts(t, pod) })
}

// TestFiveContainers is about what containers of a pod share and what they do not.
func TestFiveContainers(t *testing.T) {
	n := sharedNode(t)
	pod := runPod(t, n, harness.PodSpec{Change: func(c *runtimeapi.PodSandboxConfig) {
		c.Linux.Sysctls = map[string]string{"net.ipv4.tcp_keepalive_time": "777", "kernel.shm_rmid_forced": "1"}
		c.DnsConfig.Options = []string{"ndots:3"}
	}})
	status, _, err := pod.Status(testContext(t))
	require.NoError(t, err)
	require.Len(t, status.GetNetwork().GetAdditionalIps(), 1)
	ips := []string{status.GetNetwork().GetIp(), status.GetNetwork().GetAdditionalIps()[0].GetIp()} // IPv4 and IPv6

	var all []*harness.Container
	for i := range 5 {
		all = append(all, runContainer(t, pod, harness.ContainerSpec{
			Name:   fmt.Sprintf("five-%d", i),
			Script: fmt.Sprintf("echo %d > /own; while :; do echo container %d | nc -l -p %d; done & %s", i, i, 9000+i, idle),
		}))
	}
	t.Run("loopback", func(t *testing.T) {
		for i, c := range all {
			to := (i + 1) % len(all)
			got := output(t, c, fmt.Sprintf("until nc 127.0.0.1 %d < /dev/null; do usleep 20000; done", 9000+to))
			assert.Equal(t, fmt.Sprintf("container %d", to), got)
		}
	})
	t.Run("from the node", func(t *testing.T) {
		ctx := testContext(t)
		for _, ip := range ips {
			var got string
			waitFor(t, ctx, "the container listens on "+ip, func() bool {
				conn, err := n.Dial(ctx, "tcp", net.JoinHostPort(ip, "9000"))
				if err != nil {
					return false
				}
				defer conn.Close()
				b, err := io.ReadAll(conn)
				got = string(b)
				return err == nil && got != ""
			})
			assert.Equal(t, "container 0\n", got, ip)
		}
		succeed(t, n.Command(ctx, n.Artifacts().Busybox, "ping", "-c", "1", "-W", "30", ips[0]))
		output(t, all[0], "ping -c 1 -W 30 10.88.0.1")
	})
	t.Run("port-forward", func(t *testing.T) { checkPortForward(t, n, pod, all[0], 9000, "container 0") })
	t.Run("boot and hostname", func(t *testing.T) {
		first := output(t, all[0], "cat /proc/sys/kernel/random/boot_id; hostname")
		for _, c := range all[1:] {
			assert.Equal(t, first, output(t, c, "cat /proc/sys/kernel/random/boot_id; hostname"))
		}
		assert.Contains(t, first, pod.Config.GetHostname())
	})
	t.Run("root filesystems are apart", func(t *testing.T) {
		for i, c := range all {
			assert.Equal(t, itoa(int64(i)), output(t, c, "cat /own"))
		}
	})
	t.Run("shared memory", func(t *testing.T) {
		output(t, all[0], "echo shared > /dev/shm/file")
		assert.Equal(t, "shared", output(t, all[4], "cat /dev/shm/file"))
		assert.Equal(t, output(t, all[0], "readlink /proc/self/ns/ipc"), output(t, all[4], "readlink /proc/self/ns/ipc"))
		assert.Equal(t, "65536", output(t, all[2], "df -k /dev/shm | awk 'NR==2 { print $2 }'"), "64 MiB, as usual")
	})
	t.Run("processes are apart", func(t *testing.T) {
		assert.NotEqual(t, output(t, all[0], "readlink /proc/self/ns/pid"), output(t, all[1], "readlink /proc/self/ns/pid"))
		processes := output(t, all[1], "ps -o args")
		assert.Contains(t, processes, "echo 1 > /own")
		assert.NotContains(t, processes, "echo 0 > /own")
	})
	t.Run("processes of a target", func(t *testing.T) { checkTarget(t, n, pod, all[1]) })
	t.Run("sysctls", func(t *testing.T) {
		assert.Equal(t, "777\n1", output(t, all[3], "cat /proc/sys/net/ipv4/tcp_keepalive_time /proc/sys/kernel/shm_rmid_forced"))
	})
	t.Run("files of the pod", func(t *testing.T) {
		assert.Equal(t, pod.Config.GetHostname(), output(t, all[0], "cat /etc/hostname"))
		assert.Equal(t, []string{"nameserver 10.88.0.1", "options ndots:3", "search cloister.test"},
			sortedLines(output(t, all[0], "cat /etc/resolv.conf")))
		assert.Regexp(t, `(?m)^127\.0\.0\.1\s+localhost`, output(t, all[0], "cat /etc/hosts"))
		assert.Contains(t, output(t, all[0], "ping -c 1 -W 30 localhost"), "127.0.0.1")
	})
	t.Run("list", func(t *testing.T) {
		answer, err := n.CRI().Runtime.ListContainers(testContext(t), &runtimeapi.ListContainersRequest{
			Filter: &runtimeapi.ContainerFilter{PodSandboxId: pod.ID,
				State: &runtimeapi.ContainerStateValue{State: runtimeapi.ContainerState_CONTAINER_RUNNING}},
		})
		require.NoError(t, err)
		assert.Len(t, answer.GetContainers(), 5)
	})
	t.Run("one ends, the others do not", func(t *testing.T) {
		ctx := testContext(t)
		require.NoError(t, all[0].Remove(ctx))
		again := runContainer(t, pod, harness.ContainerSpec{Name: "five-0"})
		_, err := again.Output(ctx, "cat", "/own")
		require.Error(t, err, "a new container has a new root filesystem")
		assert.Equal(t, "shared", output(t, again, "cat /dev/shm/file"))
		assert.Equal(t, "1", output(t, all[1], "cat /own"))
	})
}

// TestSharedProcesses: a pod whose containers see each other's processes (shareProcessNamespace).
func TestSharedProcesses(t *testing.T) {
	n := sharedNode(t)
	share := &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_POD}
	pod := runPod(t, n, harness.PodSpec{Change: func(c *runtimeapi.PodSandboxConfig) { c.Linux.SecurityContext.NamespaceOptions = share }})
	spec := func(script string) harness.ContainerSpec {
		return harness.ContainerSpec{Script: script,
			Change: func(c *runtimeapi.ContainerConfig) { c.Linux.SecurityContext.NamespaceOptions = share }}
	}
	one := runContainer(t, pod, spec("echo one > /mine; "+idle+"; : marker-one"))
	two := runContainer(t, pod, spec("{ trap '' TERM; while :; do sleep 1000; done; } & echo $! > /child; "+idle))
	assert.Equal(t, output(t, one, "readlink /proc/self/ns/pid"), output(t, two, "readlink /proc/self/ns/pid"))
	assert.Equal(t, "1", output(t, two, "ps -o args | grep -c '[m]arker-one'"))
	assert.NotContains(t, output(t, one, "tr '\\0' ' ' < /proc/1/cmdline"), "/bin/sh", "process 1 is the pod's")

	// Another container's end takes its own processes with it, and no others.
	child := output(t, two, "cat /child")
	require.NoError(t, two.Remove(testContext(t)))
	assert.Equal(t, "gone", output(t, one, "[ -e /proc/"+strings.TrimSpace(child)+" ] || echo gone"))
	assert.Equal(t, "one", output(t, one, "cat /mine"))
}

// TestFivePods runs five pods at once: each its own VM, all on one network.
func TestFivePods(t *testing.T) {
	n := sharedNode(t)
	ctx := testContext(t)
	var (
		pods       [5]*harness.Pod
		containers [5]*harness.Container
		boots      [5]string
		all        errgroup.Group
	)
	for i := range pods {
		all.Go(func() (err error) {
			if pods[i], err = n.CRI().RunPod(ctx, harness.PodSpec{Handler: harness.HandlerCloister,
				Name: fmt.Sprintf("five-pods-%d", i)}); err != nil {
				return err
			}
			containers[i], err = pods[i].Run(ctx, harness.ContainerSpec{
				Script: fmt.Sprintf("while :; do echo pod %d | nc -l -p 9000; done & %s", i, idle),
			})
			if err != nil {
				return err
			}
			boots[i], err = containers[i].Output(ctx, "cat", "/proc/sys/kernel/random/boot_id")
			return err
		})
	}
	err := all.Wait()
	for _, p := range pods {
		if p != nil {
			cleanup(t, "removing the pod", p.Remove)
		}
	}
	require.NoError(t, err)
	seen := map[string]bool{}
	for _, b := range boots {
		seen[b] = true
	}
	assert.Len(t, seen, len(pods), "every pod has a kernel of its own: %v", boots)

	for i, p := range pods {
		status, _, err := p.Status(ctx)
		require.NoError(t, err)
		from := containers[(i+1)%len(pods)]
		assert.Equal(t, fmt.Sprintf("pod %d", i),
			output(t, from, "until nc "+status.GetNetwork().GetIp()+" 9000 < /dev/null; do usleep 20000; done"))
	}
	var removal errgroup.Group
	for _, p := range pods {
		removal.Go(func() error { return p.Remove(ctx) })
	}
	require.NoError(t, removal.Wait())
}
