// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cloister-project/cloister/test/harness"
)

// outsideID is which user and group outside of a pod's user namespace its root is.
const outsideID = 200000

var usersOfPod = []*runtimeapi.IDMapping{{HostId: outsideID, Length: 65536}}

func withUsers(o *runtimeapi.NamespaceOption) {
	o.UsernsOptions = &runtimeapi.UserNamespace{Mode: runtimeapi.NamespaceMode_POD, Uids: usersOfPod, Gids: usersOfPod}
}

// TestUserNamespaces compares pods that have a user namespace (hostUsers: false) with runc's.
func TestUserNamespaces(t *testing.T) {
	handlers := []string{harness.HandlerRunc, harness.HandlerCloister, harness.HandlerClassic, harness.HandlerErofs}
	n := harness.ForTest(t, harness.Options{DropIn: os.Getenv("CLOISTER_E2E_DROPIN"), Handlers: handlers})
	saw := map[string]string{}
	for _, handler := range handlers {
		t.Run(handler, func(t *testing.T) { saw[handler] = useUsers(t, n, handler) })
	}
	assert.Contains(t, saw[harness.HandlerRunc], "/bin/busybox 0:0\n")
	for _, handler := range handlers[1:] {
		assert.Equal(t, strings.Split(saw[harness.HandlerRunc], "\n"), strings.Split(saw[handler], "\n"), handler)
	}
	t.Run("refusals", func(t *testing.T) { checkUsersRefused(t, n) })
}

// useUsers returns what the containers of a pod saw.
func useUsers(t *testing.T, n *harness.Node, handler string) string {
	ctx := testContext(t)
	pod := runPod(t, n, harness.PodSpec{Handler: handler, Change: func(c *runtimeapi.PodSandboxConfig) {
		withUsers(c.Linux.SecurityContext.NamespaceOptions)
	}})
	k := newKubeletPod(t, pod)
	empty := k.directory("volumes/kubernetes.io~empty-dir/scratch")
	secret := k.volume("secret", "s", map[string]string{"key": "value"})
	host := t.TempDir()
	for _, dir := range []string{"root", "user"} {
		require.NoError(t, os.Mkdir(filepath.Join(host, dir), 0o755))
	}
	require.NoError(t, os.Chown(filepath.Join(host, "user"), 1000, 1000))
	require.NoError(t, os.Chmod(filepath.Dir(host), 0o755)) // the directory of the test's directories is for its owner
	volume := func(from, to string, mapped bool) *runtimeapi.Mount {
		m := &runtimeapi.Mount{HostPath: from, ContainerPath: to}
		if mapped {
			m.UidMappings, m.GidMappings = usersOfPod, usersOfPod
		}
		return m
	}
	c := runContainer(t, pod, harness.ContainerSpec{
		Mounts: []*runtimeapi.Mount{volume(empty, "/empty", true), volume(secret, "/secret", true), volume(host, "/host", true),
			volume(host, "/unmapped", false)},
		Change: func(c *runtimeapi.ContainerConfig) { withUsers(c.Linux.SecurityContext.NamespaceOptions) },
	})
	script := `cat /proc/self/uid_map /proc/self/gid_map; id -u
cd /; stat -c '%n %u:%g' /bin /bin/busybox /etc/hosts /etc/resolv.conf /secret/key /empty
stat -c '%n %u:%g' /host /host/root /host/user /unmapped /unmapped/user
echo x > /root/made && echo x > /empty/made && echo x > /host/root/made && chown 7:8 /root/made /host/root/made
stat -c '%n %u:%g' /root/made /empty/made /host/root/made
echo x 2>&1 > /unmapped/root/other
cat /secret/key; echo; mknod /dev/sda b 8 0 2>&1; chown 100000 /root/made 2>&1; mount -t tmpfs none /mnt 2>&1
grep Cap[EB] /proc/self/status`
	result, err := c.Exec(ctx, "sh", "-c", script)
	require.NoError(t, err)
	as := runContainer(t, pod, harness.ContainerSpec{
		Mounts: []*runtimeapi.Mount{volume(host, "/host", true), volume(empty, "/empty", true)},
		Change: func(c *runtimeapi.ContainerConfig) {
			withUsers(c.Linux.SecurityContext.NamespaceOptions)
			c.Linux.SecurityContext.RunAsUser = &runtimeapi.Int64Value{Value: 1000}
			c.Linux.SecurityContext.RunAsGroup = &runtimeapi.Int64Value{Value: 1000}
		},
	})
	other := output(t, as, "id; echo x > /host/user/mine && stat -c '%n %u:%g' /host/user/mine; cat /empty/made; "+
		"echo x 2>&1 > /host/root/mine; true")
	shares := func(c *runtimeapi.ContainerConfig) {
		withUsers(c.Linux.SecurityContext.NamespaceOptions)
		c.Linux.SecurityContext.NamespaceOptions.Pid = runtimeapi.NamespaceMode_POD
	}
	first := runContainer(t, pod, harness.ContainerSpec{Script: idle + "; : of-the-first", Change: shares})
	second := runContainer(t, pod, harness.ContainerSpec{Change: shares})
	other += output(t, second, "ps -o args | grep -c of-the-firs[t]; readlink /proc/self/ns/pid | cut -c 1-4")
	assert.Equal(t, output(t, first, "readlink /proc/self/ns/user"), output(t, second, "readlink /proc/self/ns/user"), "it is the pod's")
	debugger := runContainer(t, pod, harness.ContainerSpec{Change: func(config *runtimeapi.ContainerConfig) {
		withUsers(config.Linux.SecurityContext.NamespaceOptions)
		config.Linux.SecurityContext.NamespaceOptions.Pid = runtimeapi.NamespaceMode_TARGET
		config.Linux.SecurityContext.NamespaceOptions.TargetId = c.ID
	}})
	other += output(t, debugger, "cat /proc/1/root/secret/key")
	for path, owner := range map[string]uint32{"root/made": 7, "user/mine": 1000} {
		var st unix.Stat_t
		require.NoError(t, unix.Stat(filepath.Join(host, path), &st))
		assert.Equal(t, owner, st.Uid, "on the host %s belongs to the user of the same number", path)
	}
	assert.NoFileExists(t, filepath.Join(host, "root/other"))
	return result.Stdout + result.Stderr + other
}

func checkUsersRefused(t *testing.T, n *harness.Node) {
	for says, users := range map[string]*runtimeapi.UserNamespace{
		"not mapped":   {Uids: []*runtimeapi.IDMapping{{HostId: 1, ContainerId: 1, Length: 9}}, Gids: usersOfPod},
		"CONTAINER":    {Mode: runtimeapi.NamespaceMode_CONTAINER},
		"TARGET":       {Mode: runtimeapi.NamespaceMode_TARGET},
		"only one uid": {}, // containerd's own words
	} {
		pod, err := n.CRI().RunPod(testContext(t), harness.PodSpec{
			Handler: harness.HandlerCloister,
			Change: func(c *runtimeapi.PodSandboxConfig) {
				c.Linux.SecurityContext.NamespaceOptions.UsernsOptions = users
			},
		})
		if err == nil {
			assert.NoError(t, pod.Remove(testContext(t)))
		}
		assert.ErrorContains(t, err, says)
	}
}
