// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cloister-project/cloister/test/harness"
)

// checkMounts is about directories and files of the host in containers, and about what else a container brings along.
func checkMounts(t *testing.T, pod *harness.Pod) {
	dir := t.TempDir()
	directory, fixed, file := filepath.Join(dir, "directory"), filepath.Join(dir, "fixed"), filepath.Join(dir, "file")
	require.NoError(t, os.Mkdir(directory, 0o777))
	require.NoError(t, os.Mkdir(fixed, 0o755))
	require.NoError(t, os.WriteFile(filepath.Join(fixed, "inside"), []byte("fixed\n"), 0o644))
	require.NoError(t, os.WriteFile(file, []byte("one\n"), 0o644))
	secret := filepath.Join(dir, "secret")
	require.NoError(t, os.WriteFile(secret, []byte("not shared\n"), 0o644))
	require.NoError(t, os.Symlink(secret, filepath.Join(directory, "escape")))

	mounts := []*runtimeapi.Mount{
		{HostPath: directory, ContainerPath: "/directory"},
		{HostPath: fixed, ContainerPath: "/deep/down/fixed", Readonly: true},
		{HostPath: fixed, ContainerPath: "/recursive", Readonly: true, RecursiveReadOnly: true},
		{HostPath: file, ContainerPath: "/etc/single"},
		{HostPath: file, ContainerPath: "/etc/single-ro", Readonly: true},
	}
	one := runContainer(t, pod, harness.ContainerSpec{Mounts: mounts})
	two := runContainer(t, pod, harness.ContainerSpec{Mounts: mounts[:1]})

	t.Run("directory, both ways", func(t *testing.T) {
		require.NoError(t, os.WriteFile(filepath.Join(directory, "from-host"), []byte("hello\n"), 0o644))
		assert.Equal(t, "hello", output(t, one, "cat /directory/from-host"))
		output(t, one, "echo answer > /directory/from-guest; mkdir /directory/sub; echo 2 > /directory/sub/file; rm /directory/from-host")
		got, err := os.ReadFile(filepath.Join(directory, "from-guest"))
		require.NoError(t, err)
		assert.Equal(t, "answer\n", string(got))
		assert.FileExists(t, filepath.Join(directory, "sub", "file"))
		assert.NoFileExists(t, filepath.Join(directory, "from-host"))
		assert.Equal(t, "answer", output(t, two, "cat /directory/from-guest"), "both containers have the same directory")
		object := func(c *harness.Container, path string) string { return output(t, c, "stat -c %d:%i "+path) }
		assert.Equal(t, object(one, "/directory"), object(two, "/directory"), "one object of the host is one in the guest")
		assert.Equal(t, object(one, "/deep/down/fixed"), object(one, "/recursive"))
	})
	t.Run("no way out of it", func(t *testing.T) {
		result, err := one.Exec(testContext(t), "cat", "/directory/escape")
		require.NoError(t, err)
		assert.NotZero(t, result.ExitCode, "the link leads to the container's own files")
		assert.NotContains(t, result.Stdout, "not shared")
	})
	t.Run("read-only", func(t *testing.T) {
		assert.Equal(t, "fixed", output(t, one, "cat /deep/down/fixed/inside"))
		for _, script := range []string{
			"echo x > /deep/down/fixed/inside", "touch /recursive/new",
			"touch /deep/down/fixed/new", "rm /deep/down/fixed/inside", "echo x > /etc/single-ro",
		} {
			result, err := one.Exec(testContext(t), "sh", "-c", script)
			require.NoError(t, err)
			assert.NotZero(t, result.ExitCode, script)
			assert.Contains(t, result.Stderr, "Read-only file system", script)
		}
	})
	t.Run("single file", func(t *testing.T) {
		assert.Equal(t, "one\none", output(t, one, "cat /etc/single /etc/single-ro"))
		output(t, one, "echo two > /etc/single")
		got, err := os.ReadFile(file)
		require.NoError(t, err)
		assert.Equal(t, "two\n", string(got))
		assert.Equal(t, "two", output(t, one, "cat /etc/single-ro"))
	})
	t.Run("large file", func(t *testing.T) {
		data := randomBytes(4 << 20)
		require.NoError(t, os.WriteFile(filepath.Join(directory, "large"), data, 0o644))
		assert.Equal(t, sum(data), strings.Fields(output(t, one, "sha256sum /directory/large"))[0])
		output(t, one, "cp /directory/large /directory/copy")
		got, err := os.ReadFile(filepath.Join(directory, "copy"))
		require.NoError(t, err)
		assert.Equal(t, sum(data), sum(got))
	})
	t.Run("gone with its container", func(t *testing.T) {
		require.NoError(t, two.Remove(testContext(t)))
		assert.Equal(t, "answer", output(t, one, "cat /directory/from-guest"))
	})
	t.Run("not there", func(t *testing.T) {
		c, err := pod.Create(testContext(t), harness.ContainerSpec{Mounts: []*runtimeapi.Mount{{HostPath: fixed + "/inside",
			ContainerPath: "/x"}}})
		require.NoError(t, err)
		cleanup(t, "removing the container", c.Remove)
		require.NoError(t, os.Remove(filepath.Join(fixed, "inside")))
		require.ErrorContains(t, c.Start(testContext(t)), "no such file or directory")
	})
	t.Run("environment", func(t *testing.T) { checkEnvironment(t, pod) })
	t.Run("working directory", func(t *testing.T) {
		c := runContainer(t, pod, harness.ContainerSpec{Change: func(c *runtimeapi.ContainerConfig) { c.WorkingDir = "/made/for/it" }})
		assert.Equal(t, "/made/for/it", output(t, c, "pwd"))
	})
}

// checkEnvironment brings 300 KiB of variables, one of them of 100 KiB (the kernel's limit for one is 128 KiB).
func checkEnvironment(t *testing.T, pod *harness.Pod) {
	env := map[string]string{"SMALL": "a b=c\"'$x\n", "LARGE": strings.Repeat("0123456789", 10<<10)}
	for _, name := range []string{"A", "B", "C", "D"} {
		env[name] = strings.Repeat(name, 50<<10)
	}
	c := runContainer(t, pod, harness.ContainerSpec{Env: env})
	got := output(t, c, "tr '\\0' '\\001' < /proc/1/environ")
	for name, value := range env {
		assert.True(t, strings.Contains("\x01"+got, "\x01"+name+"="+value+"\x01"), "variable %s", name)
	}
	assert.Equal(t, "102400", output(t, c, "echo -n \"$LARGE\" | wc -c"), "execs have it, too")
}
