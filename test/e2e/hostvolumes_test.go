// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cloister-project/cloister/test/harness"
)

// TestHostVolumes is about directories of the host in an ordinary pod, which behave as on a machine of their own.
func TestHostVolumes(t *testing.T) {
	n := sharedNode(t)
	image := toolImage(t, n, hostArch(), "volumeprobe")
	pod := runPod(t, n, harness.PodSpec{})
	container := func(script string, mounts ...*runtimeapi.Mount) *harness.Container {
		return runContainer(t, pod, harness.ContainerSpec{Image: image, Script: script, Mounts: mounts})
	}
	t.Run("one object", func(t *testing.T) { checkParts(t, container) })
	t.Run("mounts below", func(t *testing.T) { checkSubmounts(t, container) })
	t.Run("permissions", func(t *testing.T) { checkPermissions(t, pod, image) })
}

type newContainer = func(script string, mounts ...*runtimeapi.Mount) *harness.Container

func object(t *testing.T, c *harness.Container, path string) string {
	t.Helper()
	return output(t, c, "stat -c %d:%i "+path)
}

// checkParts mounts a directory and parts of it, before and after it, read-only and writable.
func checkParts(t *testing.T, container newContainer) {
	volume := t.TempDir()
	for _, part := range []string{"early/deep", "late"} {
		require.NoError(t, os.MkdirAll(filepath.Join(volume, part), 0o777))
	}
	// As the kubelet gives a subPath: a mount of its own elsewhere.
	subpath := t.TempDir()
	require.NoError(t, unix.Mount(filepath.Join(volume, "late"), subpath, "", unix.MS_BIND, ""))
	defer func() { require.NoError(t, unix.Unmount(subpath, unix.MNT_DETACH)) }()

	early := container(idle, &runtimeapi.Mount{HostPath: filepath.Join(volume, "early"), ContainerPath: "/early", Readonly: true})
	whole := container(idle, &runtimeapi.Mount{HostPath: volume, ContainerPath: "/whole"})
	late := container(idle,
		&runtimeapi.Mount{HostPath: subpath, ContainerPath: "/late"},
		&runtimeapi.Mount{HostPath: filepath.Join(volume, "early/deep"), ContainerPath: "/deep"})
	assert.Equal(t, object(t, whole, "/whole/early"), object(t, early, "/early"))
	assert.Equal(t, object(t, whole, "/whole/late"), object(t, late, "/late"))
	assert.Equal(t, object(t, whole, "/whole/early/deep"), object(t, late, "/deep"))
	result, err := early.Exec(testContext(t), "touch", "/early/x")
	require.NoError(t, err)
	assert.Contains(t, result.Stderr, "Read-only file system", "it is as writable as its own mount says")
	output(t, whole, "echo x > /whole/early/x")
	assert.Equal(t, "x", output(t, early, "cat /early/x"))

	for _, place := range []struct {
		name, inWhole string
		other         *harness.Container
		inOther       string
	}{{"early", "/whole/early/deep", early, "/early/deep"}, {"late", "/whole/late", late, "/late"}} {
		output(t, whole, "mkfifo "+place.inWhole+"/fifo; (echo through > "+place.inWhole+"/fifo) > /dev/null 2>&1 &")
		assert.Equal(t, "through", output(t, place.other, "cat "+place.inOther+"/fifo"), place.name)
		output(t, whole, "(volumeprobe listen "+place.inWhole+"/socket) > /dev/null 2>&1 &")
		waitFor(t, testContext(t), "the socket", func() bool {
			return output(t, place.other, "ls "+place.inOther+" | grep -c socket || true") == "1"
		})
		assert.Equal(t, "hello", output(t, place.other, "volumeprobe dial "+place.inOther+"/socket"), place.name)
	}
	output(t, whole, "(sleep 3600 | volumeprobe lock /whole/late/lock) > /tmp/lock 2>&1 &")
	waitFor(t, testContext(t), "the lock is held", func() bool { return output(t, whole, "cat /tmp/lock") == "locked" })
	assert.Contains(t, output(t, late, "volumeprobe lock /late/lock < /dev/null || true"), "busy")
}

// checkSubmounts: what is mounted below a directory is one file system for all, and as writable as on the host.
func checkSubmounts(t *testing.T, container newContainer) {
	volume := t.TempDir()
	below := filepath.Join(volume, "below")
	require.NoError(t, os.Mkdir(below, 0o755))
	require.NoError(t, unix.Mount("tmpfs", below, "tmpfs", 0, ""))
	defer func() { require.NoError(t, unix.Unmount(below, 0), "no container keeps it busy") }()
	require.NoError(t, os.Mkdir(filepath.Join(below, "inner"), 0o755))
	mount := func(readonly, recursive bool) *runtimeapi.Mount {
		return &runtimeapi.Mount{HostPath: volume, ContainerPath: "/volume", Readonly: readonly, RecursiveReadOnly: recursive}
	}
	top, all, writable := container(idle, mount(true, false)), container(idle, mount(true, true)), container(idle, mount(false, false))
	inner := container(idle, &runtimeapi.Mount{HostPath: filepath.Join(below, "inner"), ContainerPath: "/inner"})
	defer func() {
		for _, c := range []*harness.Container{top, all, writable, inner} {
			require.NoError(t, c.Remove(testContext(t)))
		}
	}()
	for _, try := range []struct {
		c        *harness.Container
		path     string
		readonly bool
	}{{top, "/volume/x", true}, {top, "/volume/below/x", false}, {all, "/volume/below/x", true}, {writable, "/volume/x", false}} {
		result, err := try.c.Exec(testContext(t), "touch", try.path)
		require.NoError(t, err)
		assert.Equal(t, try.readonly, result.ExitCode != 0, "%s: %s", try.path, result.Stderr)
	}
	assert.Equal(t, object(t, top, "/volume/below"), object(t, writable, "/volume/below"))
	assert.NotEqual(t, output(t, top, "stat -c %d /volume"), output(t, top, "stat -c %d /volume/below"), "they are two, as on the host")
	assert.Equal(t, object(t, inner, "/inner"), object(t, top, "/volume/below/inner"))
}

// checkPermissions compares what an ordinary user with a volume's group (fsGroup) may do with what it may on the host.
func checkPermissions(t *testing.T, pod *harness.Pod, image string) {
	const user, group = 1000, 2000
	prepare := func() string {
		dir := t.TempDir()
		at := func(name string) string { return filepath.Join(dir, name) }
		directory := func(name string, mode uint32) {
			require.NoError(t, os.MkdirAll(at(name), 0o755))
			require.NoError(t, os.Chown(at(name), 0, group))
			require.NoError(t, unix.Chmod(at(name), mode))
		}
		file := func(name string, mode uint32) {
			require.NoError(t, os.WriteFile(at(name), []byte("theirs"), 0o600))
			require.NoError(t, os.Chown(at(name), 0, group))
			require.NoError(t, unix.Chmod(at(name), mode))
		}
		directory(".", 0o2775)
		directory("acl", 0o2775)
		directory("closed", 0o2755)
		directory("sticky", 0o3775)
		file("theirs", 0o640)
		file("sticky/theirs", 0o660)
		file("setuid", 0o4770)
		// user::rwx, group::r-x, group:3000:rwx, mask::rwx, other::---
		acl := "\x02\x00\x00\x00\x01\x00\x07\x00\xff\xff\xff\xff\x04\x00\x05\x00\xff\xff\xff\xff\x08\x00\x07\x00\xb8\x0b\x00\x00" +
			"\x10\x00\x07\x00\xff\xff\xff\xff\x20\x00\x00\x00\xff\xff\xff\xff"
		require.NoError(t, unix.Setxattr(at("acl"), "system.posix_acl_default", []byte(acl), 0))
		return dir
	}
	probe := filepath.Join(t.TempDir(), "volumeprobe")
	out, err := exec.CommandContext(testContext(t), "go", "build", "-o", probe, "./testdata/volumeprobe").CombinedOutput()
	require.NoError(t, err, string(out))
	native := exec.CommandContext(testContext(t), probe, "permissions", prepare())
	native.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: user, Gid: user, Groups: []uint32{user, group}}}
	// The directory of the test's directories is for its owner.
	require.NoError(t, os.Chmod(filepath.Dir(filepath.Dir(probe)), 0o755))
	want, err := native.CombinedOutput()
	require.NoError(t, err, string(want))

	_, got, complaints := ended(t, pod, harness.ContainerSpec{
		Image: image, Command: []string{"volumeprobe", "permissions", "/volume"},
		Mounts: []*runtimeapi.Mount{{HostPath: prepare(), ContainerPath: "/volume"}},
		Change: func(c *runtimeapi.ContainerConfig) {
			c.Linux.SecurityContext.RunAsUser = &runtimeapi.Int64Value{Value: user}
			c.Linux.SecurityContext.RunAsGroup = &runtimeapi.Int64Value{Value: user}
			c.Linux.SecurityContext.SupplementalGroups = []int64{group}
		},
	})
	assert.Empty(t, complaints)
	// What docs/limits.md has.
	lack := strings.NewReplacer(
		fmt.Sprintf("temporary: 100640, owner %d:%d", user, group), "temporary: operation not supported",
		"acl: set: <nil>", "acl: set: operation not supported", "acl: get: <nil>", "acl: get: operation not supported")
	assert.Equal(t, strings.Split(lack.Replace(string(want)), "\n"), strings.Split(got, "\n"))
	require.Contains(t, string(want), fmt.Sprintf("directory/file: 100640, owner %d:%d", user, group))
}
