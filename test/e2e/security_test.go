// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"os"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cloister-project/cloister/test/harness"
)

// secured changes a container's security context.
func secured(change func(*runtimeapi.LinuxContainerSecurityContext)) func(*runtimeapi.ContainerConfig) {
	return func(c *runtimeapi.ContainerConfig) { change(c.GetLinux().GetSecurityContext()) }
}

// statusOf reads fields of /proc/self/status in the container, without the colon.
func statusOf(t *testing.T, c *harness.Container, fields ...string) map[string]string {
	t.Helper()
	return statusFields(output(t, c, "cat /proc/self/status"), fields...)
}

func statusFields(status string, fields ...string) map[string]string {
	got := map[string]string{}
	for line := range strings.Lines(status) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), ":")
		got[name] = strings.Join(strings.Fields(value), " ")
	}
	picked := map[string]string{}
	for _, f := range fields {
		picked[f] = got[f]
	}
	return picked
}

// checkSecurity is about the confinement inside of the guest, as the kernel there tells it.
func checkSecurity(t *testing.T, n *harness.Node, pod *harness.Pod) {
	t.Run("user and groups", func(t *testing.T) {
		c := runContainer(t, pod, harness.ContainerSpec{Change: secured(func(s *runtimeapi.LinuxContainerSecurityContext) {
			s.RunAsUser, s.RunAsGroup = &runtimeapi.Int64Value{Value: 1000}, &runtimeapi.Int64Value{Value: 1500}
			s.SupplementalGroups = []int64{3000, 4000}
		})})
		assert.Equal(t, map[string]string{
			"Uid": "1000 1000 1000 1000", "Gid": "1500 1500 1500 1500",
			"CapEff": "0000000000000000", "Groups": "1500 2000 3000 4000", // 2000: /etc/group has user in it
		}, statusOf(t, c, "Uid", "Gid", "CapEff", "Groups"))
		result, err := c.Exec(testContext(t), "touch", "/etc/passwd")
		require.NoError(t, err)
		assert.NotZero(t, result.ExitCode)
	})
	t.Run("user by name", func(t *testing.T) {
		c := runContainer(t, pod, harness.ContainerSpec{Change: secured(func(s *runtimeapi.LinuxContainerSecurityContext) {
			s.RunAsUsername = "user"
		})})
		assert.Equal(t, "uid=1000(user) gid=1000(user) groups=1000(user),2000(extra)", output(t, c, "id"))
	})
	t.Run("devices of the guest", func(t *testing.T) {
		const show = "ls /dev/fuse /dev/net/tun 2> /dev/null; cat /dev/net/tun 2>&1 || true"
		c := runContainer(t, pod, harness.ContainerSpec{Change: func(c *runtimeapi.ContainerConfig) {
			for _, path := range []string{"/dev/fuse", "/dev/net/tun"} {
				c.Devices = append(c.Devices, &runtimeapi.Device{HostPath: path, ContainerPath: path, Permissions: "rwm"})
			}
		}})
		assert.Equal(t, "/dev/fuse\n/dev/net/tun\ncat: read error: File descriptor in bad state", output(t, c, show), "they open")
		other := runContainer(t, pod, harness.ContainerSpec{})
		assert.Equal(t, "cat: can't open '/dev/net/tun': No such file or directory", output(t, other, show), "who does not ask has none")
	})
	t.Run("capabilities", func(t *testing.T) {
		c := runContainer(t, pod, harness.ContainerSpec{Change: secured(func(s *runtimeapi.LinuxContainerSecurityContext) {
			s.Capabilities = &runtimeapi.Capability{DropCapabilities: []string{"ALL"}, AddCapabilities: []string{"NET_BIND_SERVICE", "CHOWN"}}
		})})
		const chownAndBind = "0000000000000401"
		assert.Equal(t, map[string]string{"CapPrm": chownAndBind, "CapEff": chownAndBind, "CapBnd": chownAndBind, "CapAmb": "0000000000000000"},
			statusOf(t, c, "CapPrm", "CapEff", "CapBnd", "CapAmb"))
	})
	t.Run("no new privileges, seccomp", func(t *testing.T) {
		c := runContainer(t, pod, harness.ContainerSpec{Change: secured(func(s *runtimeapi.LinuxContainerSecurityContext) {
			s.NoNewPrivs = true
			s.Seccomp = &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_RuntimeDefault}
		})})
		assert.Equal(t, map[string]string{"NoNewPrivs": "1", "Seccomp": "2"}, statusOf(t, c, "NoNewPrivs", "Seccomp"))
		result, err := c.Exec(testContext(t), "unshare", "-U", "true")
		require.NoError(t, err)
		assert.NotZero(t, result.ExitCode, "the default profile refuses user namespaces")
	})
	t.Run("default", func(t *testing.T) {
		c := runContainer(t, pod, harness.ContainerSpec{})
		assert.Equal(t, map[string]string{"NoNewPrivs": "0", "CapEff": "00000000a80425fb"}, statusOf(t, c, "NoNewPrivs", "CapEff"))
	})
	t.Run("read-only root", func(t *testing.T) {
		c := runContainer(t, pod,
			harness.ContainerSpec{Change: secured(func(s *runtimeapi.LinuxContainerSecurityContext) { s.ReadonlyRootfs = true })})
		result, err := c.Exec(testContext(t), "touch", "/file")
		require.NoError(t, err)
		assert.NotZero(t, result.ExitCode)
		assert.Contains(t, result.Stderr, "Read-only file system")
		result, err = c.Exec(testContext(t), "sh", "-c", "echo x > /etc/hosts")
		require.NoError(t, err)
		assert.NotZero(t, result.ExitCode, "the pod's files are read-only, too")
		output(t, c, "touch /dev/shm/file && rm /dev/shm/file")
	})
	t.Run("masked and read-only paths", func(t *testing.T) {
		c := runContainer(t, pod, harness.ContainerSpec{Change: secured(func(s *runtimeapi.LinuxContainerSecurityContext) {
			s.MaskedPaths = []string{"/proc/keys", "/proc/latency_stats", "/sys/firmware"}
			s.ReadonlyPaths = []string{"/proc/sys", "/proc/sysrq-trigger"}
		})})
		assert.Equal(t, "0", output(t, c, "cat /proc/keys | wc -c"))
		assert.Equal(t, "0", output(t, c, "ls /sys/firmware | wc -l"))
		result, err := c.Exec(testContext(t), "sh", "-c", "echo 1 > /proc/sys/vm/drop_caches")
		require.NoError(t, err)
		assert.NotZero(t, result.ExitCode)
	})
	t.Run("privileged", func(t *testing.T) { checkPrivileged(t, n) })
}

// checkPrivileged: a privileged container has every right inside of its VM and nothing of the host.
func checkPrivileged(t *testing.T, n *harness.Node) {
	privileged := func(s *runtimeapi.LinuxContainerSecurityContext) { s.Privileged = true }
	pod := runPod(t, n, harness.PodSpec{Change: func(c *runtimeapi.PodSandboxConfig) { c.Linux.SecurityContext.Privileged = true }})
	c := runContainer(t, pod, harness.ContainerSpec{Change: secured(privileged)})
	// All capabilities are for containerd those that it has itself, and it was started with ours.
	own, err := os.ReadFile("/proc/self/status")
	require.NoError(t, err)
	all := statusFields(string(own), "CapEff")["CapEff"]
	assert.Equal(t, map[string]string{"CapEff": all, "CapBnd": all, "Seccomp": "0"}, statusOf(t, c, "CapEff", "CapBnd", "Seccomp"))
	output(t, c, "mkdir /mnt-here && mount -t tmpfs none /mnt-here && touch /mnt-here/file && umount /mnt-here")
	output(t, c, "echo 1 > /proc/sys/vm/drop_caches")
	output(t, c, "ip addr add 127.9.9.9/8 dev lo && ip addr del 127.9.9.9/8 dev lo")
	assert.Empty(t, output(t, c, "ls /dev | grep -E '^(loop|kvm|mem|vhost)' || true"), "devices of the host are not there")
}
